"""The options of the limits of keys and tenants, and the prices of models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from serve_app.section import Section, without_password

# The environment variable with the password of the server at `url`.
PASSWORD_VARIABLE = "SERVE_APP_QUOTAS_PASSWORD"


class Price(Section):
    """The price of a model in dollars per million tokens, for the budgets and for the usage of tenants.

    Prices are rounded to a thousandth of a dollar. Prompt tokens that were in the prefix cache cost
    `cached_input_per_million`; by default as much as other prompt tokens.
    """

    input_per_million: float = Field(0, ge=0, le=100_000)
    cached_input_per_million: float | None = Field(None, ge=0, le=100_000)
    output_per_million: float = Field(0, ge=0, le=100_000)

    @model_validator(mode="after")
    def _check_cached(self) -> Price:
        if (self.cached_input_per_million or 0) > self.input_per_million:
            raise ValueError("cached_input_per_million must not exceed input_per_million")
        return self

    def nanodollars(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> int:
        """The cost of a request. A price of one dollar per million tokens is 1000 nanodollars a token."""
        full = round(1000 * self.input_per_million)
        cached = full if self.cached_input_per_million is None else round(1000 * self.cached_input_per_million)
        output = round(1000 * self.output_per_million)
        return (prompt_tokens - cached_tokens) * full + cached_tokens * cached + output_tokens * output


class QuotaOptions(Section):
    """How the limits of keys and tenants are counted, and how their usage is kept.

    Without `url` each ingress process counts for itself; with the `url` of a Redis or Valkey server all of them count
    together. A call to the server ends after `timeout_s` seconds. While the server is away, requests with limits are
    refused, or each ingress counts for itself (`when_unavailable: allow`). The reservations of an ingress that has
    ended without giving them back are given back after `lease_s` seconds. Services with different `namespace` share no
    counters.

    `default_max_tokens` is for requests without `max_tokens` of keys or tenants with limits of tokens or dollars; None
    is as many tokens as the context and the budgets leave. The usage is written to the database every `flush_s`
    seconds.
    """

    url: str | None = Field(None, pattern=r"^rediss?://[^\s/]+")
    namespace: str = ""
    timeout_s: float = Field(0.25, gt=0, le=5)
    when_unavailable: Literal["refuse", "allow"] = "refuse"
    lease_s: float = Field(30, ge=3, le=600)
    default_max_tokens: int | None = Field(None, ge=1)
    flush_s: float = Field(5, gt=0, le=60)

    @field_validator("url")
    @classmethod
    def _check_password(cls, url: str | None) -> str | None:
        return without_password(url, PASSWORD_VARIABLE)
