"""Opens the database of keys, tenants, usage and jobs: SQLite or any other that SQLAlchemy reaches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from serve_app.database_config import PASSWORD_VARIABLE, DatabaseOptions

# The tables of all parts of the service. Each part defines its own with this.
metadata = MetaData()
# Connections of one process: queries are short.
_CONNECTIONS = 5
# SQLite creates one table after the other, and each can be created by another process meanwhile.
_TRIES = 20


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
    _create_tables(engine)
    return engine


def _create_tables(engine: Engine) -> None:
    """Create the tables that are missing. Other processes may do so at the same time: then the next try finds them."""
    for _ in range(_TRIES - 1):
        try:
            metadata.create_all(engine)
            return
        except DBAPIError as error:
            if error.connection_invalidated or "exist" not in str(error.orig):  # "already exists", "unique … exists"
                raise
    metadata.create_all(engine)


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


def _prepare_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    """Readers do not block the writer (WAL), and each commit is on the disk before it returns."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
