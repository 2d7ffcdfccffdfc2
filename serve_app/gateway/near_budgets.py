"""Knows which budgets of keys and tenants are nearly used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from serve_app.gateway.counters import BUDGETS, Counter, Kind, period_of

# The share of a budget from which on it is nearly used. The HELP text of the metric has the same value.
_NEARLY = 0.9
_MOST = 10_000
_EXAMPLES = {"day": Kind.TOKENS_PER_DAY, "month": Kind.TOKENS_PER_MONTH}


def _utc_now() -> datetime:
    return datetime.now(UTC)


class NearBudgets:
    """The budgets that requests of this process have checked, as far as they are nearly used in their period."""

    def __init__(self, clock: Callable[[], datetime] = _utc_now) -> None:
        self._clock = clock
        self._near: dict[tuple[str, Kind], str] = {}

    def note(self, counters: Sequence[Counter], values: Sequence[int]) -> None:
        """Take in the values of counters after a request was let through or refused."""
        for counter, value in zip(counters, values, strict=True):
            if counter.kind in BUDGETS:
                place = (counter.subject, counter.kind)
                if value < _NEARLY * counter.limit:
                    self._near.pop(place, None)
                elif place in self._near or len(self._near) < _MOST:
                    self._near[place] = counter.period

    def count(self, word: str) -> int:
        """The number of budgets of the current "day" or "month"."""
        current = period_of(_EXAMPLES[word], self._clock())
        return sum(period == current for period in list(self._near.values()))
