"""Opens the database of keys, tenants, usage and jobs: SQLite or any other that SQLAlchemy reaches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import ConnectionPoolEntry

from serve_app.database_config import PASSWORD_VARIABLE, DatabaseOptions

# The tables of all parts of the service. Each part defines its own with this.
metadata = MetaData()
# An arbitrary number: PostgreSQL's name of the lock.
_TABLES_LOCK = 0x5E12E0
# Connections of one process: queries are short.
_CONNECTIONS = 5


def open_database(options: DatabaseOptions) -> Engine:
    """The database, with all tables that are defined so far. Raises sqlalchemy.exc.SQLAlchemyError.

    Calls on it block, so that asynchronous code runs them in threads.
    """
    url = database_url(options)
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": options.timeout_s})
        event.listen(engine, "connect", _prepare_sqlite)
    else:
        engine = create_engine(
            url, pool_size=_CONNECTIONS, max_overflow=0, pool_timeout=options.timeout_s, pool_pre_ping=True
        )
    try:
        _create_tables(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _create_tables(engine: Engine) -> None:
    """Create the tables that do not exist. Several processes do this at the same time, each waits for the others."""
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_TABLES_LOCK)))
        metadata.create_all(connection)


@contextmanager
def writing(database: Engine) -> Iterator[Connection]:
    """A transaction that reads before it writes. Raises sqlalchemy.exc.SQLAlchemyError.

    SQLite takes its lock at the beginning: a transaction that takes it later fails if another one has written since
    its first read.
    """
    with database.begin() as connection:
        if database.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def database_url(options: DatabaseOptions) -> URL:
    """The URL with the password from the environment; the SQLite file is only readable by its owner."""
    if options.url is not None:
        url = make_url(options.url)
        password = os.environ.get(PASSWORD_VARIABLE)
        return url.set(password=password) if password and url.get_backend_name() != "sqlite" else url
    file = state_dir() / "serve_app.db"
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(mode=0o600)
    return URL.create("sqlite", database=str(file))


def state_dir() -> Path:
    """The folder of data that outlives the service, by the XDG base directory specification."""
    root = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".local/state") / "serve_app"


def first_line(error: Exception) -> str:
    """The reason of an error of the database. The lines after it are the statement and its parameters."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def _prepare_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    """Readers do not block the writer (WAL), and each commit is on the disk before it returns."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
