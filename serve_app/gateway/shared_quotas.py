"""What the quota stages of all models of a process have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.config import QuotaOptions
from serve_app.core.tenants import Tenants
from serve_app.core.usage import UsageLog
from serve_app.gateway.counters import Counters, MemoryCounters
from serve_app.gateway.near_budgets import NearBudgets


class QuotaMeter(Protocol):
    """Measures the limits of one process."""

    def refused(self, subject: str, kind: str) -> None:
        """Count a request that was refused. `subject` is "key" or "tenant", and `kind` names the limit.

        If the server that counts does not answer, they are "store" and "unavailable".
        """
        ...

    def store_failed(self) -> None:
        """Count an error of the server that counts for all ingresses."""
        ...


@dataclass(frozen=True, slots=True)
class SharedQuotas:
    """The options, and what counts, keeps and measures."""

    options: QuotaOptions
    tenants: Tenants
    counters: Counters
    usage: UsageLog
    meter: QuotaMeter
    near: NearBudgets = field(default_factory=NearBudgets)


def open_counters(options: QuotaOptions, ingress: str, seeds: Mapping[str, int], meter: QuotaMeter) -> Counters:
    """The counters in this process's memory, or in the server at `options.url`. Called on the event loop.

    `ingress` is unique among the processes. A budget begins with `seeds`: what its period has used already, by the name
    of its counter.
    """
    if options.url is None:
        return MemoryCounters(seeds)
    from serve_app.gateway.redis_counters import RedisCounters  # its import takes time that only this needs

    return RedisCounters(options, ingress, seeds, meter.store_failed)
