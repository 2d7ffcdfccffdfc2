"""The database: where its file is, who may read it, and where its password comes from."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from sqlalchemy import text

from serve_app.database import database_url, open_database
from serve_app.database_config import DatabaseOptions


def test_the_file_is_in_the_state_folder_and_only_its_owner_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    database = open_database(DatabaseOptions())
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE one (id INTEGER)"))
    database.dispose()
    (file,) = (tmp_path / "serve_app").glob("*.db")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_APP_DATABASE_PASSWORD", "s3cret")
    url = database_url(DatabaseOptions(url="postgresql+psycopg://me@db/serve"))
    assert (url.username, url.password, url.host) == ("me", "s3cret", "db")
    assert "s3cret" not in str(url)
