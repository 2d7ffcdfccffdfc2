from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.store import TenantStore
from tests.postgres_server import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_options(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseOptions:
    """An empty database, of each kind that is supported."""
    if request.param == "sqlite":
        return DatabaseOptions(url=f"sqlite:///{tmp_path / 'test.db'}")
    server: PostgresServer = request.getfixturevalue("postgres")
    return DatabaseOptions(url=server.create_database())


@pytest.fixture
def database(database_options: DatabaseOptions) -> Iterator[Engine]:
    database = open_database(database_options)
    yield database
    database.dispose()


@pytest.fixture
def store(database: Engine) -> TenantStore:
    return TenantStore(database, actor="tester")
