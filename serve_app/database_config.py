"""The options of the database, which holds keys, tenants, usage and jobs."""

from __future__ import annotations

from pydantic import Field, field_validator

from serve_app.section import Section, without_password

# The environment variable with the password of the database.
PASSWORD_VARIABLE = "SERVE_APP_DATABASE_PASSWORD"


class DatabaseOptions(Section):
    """The database of keys, tenants, usage and jobs, as an SQLAlchemy URL.

    Without `url` it is an SQLite file in the user's state folder, for a service on one machine. Several nodes need a
    server, for example PostgreSQL: `postgresql+psycopg://user@host/name`. A query ends after `timeout_s` seconds.
    """

    url: str | None = Field(None, pattern=r"^[a-z][a-z0-9+]*://")
    timeout_s: float = Field(5, gt=0, le=60)

    @field_validator("url")
    @classmethod
    def _check_password(cls, url: str | None) -> str | None:
        return without_password(url, PASSWORD_VARIABLE)
