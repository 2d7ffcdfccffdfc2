"""What the response cache does for the requests of a call, reported from the gateway to the HTTP layer."""

from __future__ import annotations

from contextvars import ContextVar
from enum import StrEnum


class CacheStatus(StrEnum):
    """`hit`: the answer comes from the cache, or from the computation of an equal request. `miss`: it is computed.

    `bypass`: the cache is not used, because the request is not deterministic or asks for it.
    """

    HIT = "hit"
    MISS = "miss"
    BYPASS = "bypass"


class CacheReport:
    """The statuses of the requests of one call so far."""

    def __init__(self) -> None:
        self._statuses: set[CacheStatus] = set()

    def add(self, status: CacheStatus) -> None:
        self._statuses.add(status)

    @property
    def status(self) -> CacheStatus | None:
        """The common status of all requests, MISS if they differ, None before the first one."""
        if len(self._statuses) > 1:
            return CacheStatus.MISS
        return next(iter(self._statuses), None)


# The report of the current call; None outside of a call.
current_report: ContextVar[CacheReport | None] = ContextVar("current_report", default=None)
