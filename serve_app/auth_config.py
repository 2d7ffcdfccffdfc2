"""The options of authentication: API keys, and tokens of an identity provider."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from serve_app.core.tenants import Scope
from serve_app.section import Section

# Signatures by a private key that the service does not have. With HS256, who can check a token can also sign one.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class Oidc(Section):
    """Tokens (JWT) of an identity provider by OpenID Connect, as well as API keys.

    A token must have this `issuer`, this `audience`, and a signature by a key of `jwks_url` with one of `algorithms`.
    `tenant_claim` is the claim with the name of the tenant. `scope_claim` is the claim with the scopes, and
    `models_claim` the one with the models that the caller may use; a text with spaces, or a list. Without `scope_claim`
    every token has `default_scopes`; without `models_claim` it may use all models. Clocks may differ by `leeway_s`. The
    keys are read every `refresh_s` seconds, and when a token has an unknown one.
    """

    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    jwks_url: str = Field(pattern=r"^https?://[^\s/]+")
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256")
    tenant_claim: str = Field("tenant", min_length=1)
    scope_claim: str | None = Field(None, min_length=1)
    models_claim: str | None = Field(None, min_length=1)
    default_scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    leeway_s: float = Field(30, ge=0, le=300)
    refresh_s: float = Field(300, ge=1, le=86_400)

    @field_validator("jwks_url")
    @classmethod
    def _check_transport(cls, url: str) -> str:
        """Who can change the answer of this URL can sign tokens."""
        if urlsplit(url).scheme != "https" and not is_loopback(urlsplit(url).hostname or ""):
            raise ValueError("use https, except on loopback: the answer has the keys that tokens are checked with")
        return url


class AuthOptions(Section):
    """Who may use the service. `auth: null` serves everyone, and is allowed on loopback only.

    The keys are in the `database`. A change of them is known after `refresh_s` seconds. When the database cannot be
    read for `max_stale_s` seconds, the service refuses all keys with 503. `allow_anonymous` serves everyone who reaches
    the port, without keys, on any address.
    """

    allow_anonymous: bool = False
    refresh_s: float = Field(2, ge=0.1, le=60)
    max_stale_s: float = Field(3600, ge=60)
    oidc: Oidc | None = None

    @model_validator(mode="after")
    def _check_anonymous(self) -> AuthOptions:
        if self.allow_anonymous and self.oidc is not None:
            raise ValueError("allow_anonymous serves requests without any token; remove oidc, or allow_anonymous")
        return self


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens on this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
