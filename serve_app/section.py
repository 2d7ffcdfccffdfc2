"""The base class of all sections of the configuration, and a check that several of them share."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the configuration file: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def without_password(url: str | None, variable: str) -> str | None:
    """The URL. Raises ValueError if it has a password: Ray shows the configuration in its dashboard and in its logs.

    `variable` is the environment variable that the password belongs into.
    """
    if url is not None and (urlsplit(url).password is not None or "password=" in urlsplit(url).query):
        raise ValueError(f"the URL has a password; set it in the environment variable {variable}")
    return url
