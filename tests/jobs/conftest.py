from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.database_config import DatabaseOptions
from tests.postgres_server import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> DatabaseOptions:
    """An empty database, for what does not depend on its kind."""
    return DatabaseOptions(url=f"sqlite:///{tmp_path}/jobs.db")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_options(request: pytest.FixtureRequest, sqlite: DatabaseOptions) -> DatabaseOptions:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite
    server: PostgresServer = request.getfixturevalue("postgres")
    return DatabaseOptions(url=server.create_database())
