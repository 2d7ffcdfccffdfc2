"""The options of the response cache."""

from __future__ import annotations

from pydantic import Field, field_validator

from serve_app.section import Section, without_password

# The environment variable with the password of the server at `url`.
PASSWORD_VARIABLE = "SERVE_APP_RESPONSE_CACHE_PASSWORD"


class CacheOptions(Section):
    """The cache of answers to deterministic requests.

    Without `url` each ingress process keeps up to `max_bytes` of answers in its memory; with the `url` of a Redis or
    Valkey server that server keeps them for all ingresses, within its own limit of memory. An answer expires `ttl_s`
    seconds after it was stored. Services with different `namespace` share no answers. The server is not waited for
    longer than `timeout_s`.
    """

    max_bytes: int = Field(268_435_456, ge=1024)
    max_answer_bytes: int = Field(1_048_576, ge=1024)
    ttl_s: float = Field(3600, gt=0)
    namespace: str = ""
    url: str | None = Field(None, pattern=r"^rediss?://[^\s/]+")
    timeout_s: float = Field(0.05, gt=0, le=1)

    @field_validator("url")
    @classmethod
    def _check_password(cls, url: str | None) -> str | None:
        return without_password(url, PASSWORD_VARIABLE)
