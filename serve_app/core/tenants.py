"""Who sends a request: the identity that an API key or a token of an identity provider proves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
