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


@pytest.fixture(params=["sqlite", "postgresql"])
def database_options(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseOptions:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return DatabaseOptions(url=f"sqlite:///{tmp_path}/jobs.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return DatabaseOptions(url=server.create_database())
