"""Who sends a request: the identity that a key or a token proves, and the tenant with its limits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

# Names of tenants are in logs, in headers, and in salts, which NUL divides.
_TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")


def is_tenant_name(text: str) -> bool:
    return _TENANT_NAME.fullmatch(text) is not None


class Scope(StrEnum):
    """What a key allows: requests to models, administration, or reading metrics."""

    INFERENCE = "inference"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller of an HTTP request.

    `tenant` is the group that shares limits, budgets and stored objects; "" without keys. `key` is the public id of the
    API key, or the subject of a token; "" without keys. `models` are the models that the caller may use; None is all.
    """

    tenant: str
    key: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None


# The caller of a service without keys: all scopes, all models.
ANYONE = Identity("", "", frozenset(Scope))


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a key, or of a tenant over all its keys; None is no limit. Days and months are those of UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    dollars_per_day: float | None = None
    dollars_per_month: float | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A group of keys. While requests wait, tenants get tokens in proportion to their `weight`."""

    name: str
    weight: float = 1.0
    limits: Limits = Limits()


class Tenants(Protocol):
    """The tenants and keys as this process knows them. The calls return at once, without I/O."""

    def tenant(self, name: str) -> Tenant:
        """The tenant; one with the defaults if the name is not known, or ""."""
        ...

    def key_limits(self, key: str) -> Limits:
        """The limits of a key by its public id; no limits if the id is not known, or ""."""
        ...


class CredentialsRefused(Exception):
    """A key or token is not valid. `reason` is one of REASONS, for the metrics; `message` is for the caller."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


# Why a call is refused: no key; several different ones; an unknown id or a wrong secret; a key that was valid; a token
# that is not valid; a key without the scope of the route; the keys cannot be read.
REASONS = ("missing", "conflict", "invalid", "expired", "revoked", "token", "scope", "unavailable")


class Authenticator(Protocol):
    """Knows the valid keys and tokens."""

    async def authenticate(self, credentials: str) -> Identity:
        """The identity that a key or token proves. Raises CredentialsRefused, and NotReady if it cannot be checked."""
        ...


class NoTenants:
    """The tenants of a service without keys: all have the defaults."""

    def tenant(self, name: str) -> Tenant:
        return Tenant(name)

    def key_limits(self, key: str) -> Limits:
        return _NO_LIMITS


_NO_LIMITS = Limits()
