"""The counters behind the limits: token buckets, numbers of a period, and reservations over several of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from math import ceil
from typing import Protocol

# A bucket counts in 1/60000 of a request or token: a limit of n a minute refills n of these parts each millisecond, so
# that all arithmetic is in whole numbers, and a refund is exact.
PARTS = 60_000
# Counters of subjects that have not been used for the longest time are dropped above this number.
_MOST_COUNTERS = 100_000


class Kind(StrEnum):
    """The kinds of limits, by their names in `core.tenants.Limits`."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    CONCURRENT_REQUESTS = "concurrent_requests"
    TOKENS_PER_DAY = "tokens_per_day"
    TOKENS_PER_MONTH = "tokens_per_month"
    DOLLARS_PER_DAY = "dollars_per_day"
    DOLLARS_PER_MONTH = "dollars_per_month"


BUCKETS = frozenset({Kind.REQUESTS_PER_MINUTE, Kind.TOKENS_PER_MINUTE})
BUDGETS = frozenset({Kind.TOKENS_PER_DAY, Kind.TOKENS_PER_MONTH, Kind.DOLLARS_PER_DAY, Kind.DOLLARS_PER_MONTH})
TOKENS = frozenset({Kind.TOKENS_PER_MINUTE, Kind.TOKENS_PER_DAY, Kind.TOKENS_PER_MONTH})
DOLLARS = frozenset({Kind.DOLLARS_PER_DAY, Kind.DOLLARS_PER_MONTH})


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter and its limit, in requests, tokens or nanodollars.

    `subject` is "key:" or "tenant:" and a name. `period` is the day or the month of a budget in UTC, as 2026-11-30 or
    2026-11; "" for other kinds.
    """

    subject: str
    kind: Kind
    limit: int
    period: str = ""

    @property
    def name(self) -> str:
        return f"{self.subject}:{self.kind}:{self.period}" if self.period else f"{self.subject}:{self.kind}"


@dataclass(slots=True)
class Reservation:
    """Amounts that are reserved of counters. `used` is how much of each is used so far, for a process that is killed.

    `local` is set by a store that has reserved in this process, because its server was away.
    """

    id: str
    counters: tuple[Counter, ...]
    amounts: tuple[int, ...]
    used: Callable[[], Sequence[int]]
    local: bool = False


class CountersUnavailable(Exception):
    """The counters cannot be reached, and requests are not let through without them."""


class Counters(Protocol):
    """Keeps counters. A value is the parts in a bucket, or the number that is used or reserved of any other counter."""

    async def reserve(self, reservation: Reservation) -> tuple[bool, Sequence[int]]:
        """Reserve all amounts, or none of them. The values of the counters are those after it.

        Raises CountersUnavailable.
        """
        ...

    def settle(self, reservation: Reservation, used: Sequence[int]) -> None:
        """End a reservation: what was reserved and not used is given back. Returns at once."""
        ...

    async def close(self) -> None: ...


def remaining(counter: Counter, value: int) -> int:
    """What is left of a limit."""
    return max(0, value // PARTS if counter.kind in BUCKETS else counter.limit - value)


def fits(counter: Counter, value: int, amount: int) -> bool:
    return value >= amount * PARTS if counter.kind in BUCKETS else value + amount <= counter.limit


def wait_s(counter: Counter, value: int, amount: int, now: datetime) -> float | None:
    """The seconds after which the amount can fit, if nothing else is reserved meanwhile; None if it never can.

    When a concurrent request ends is not known: the time is 1 s.
    """
    if amount > counter.limit:
        return None
    if counter.kind in BUCKETS:
        return max(0, ceil((amount * PARTS - value) / counter.limit)) / 1000
    return (
        1.0
        if counter.kind is Kind.CONCURRENT_REQUESTS
        else max(1.0, (period_end(counter.period) - now).total_seconds())
    )


def reset_s(counter: Counter, value: int) -> float:
    """The seconds until a bucket is full again."""
    return max(0, ceil((counter.limit * PARTS - value) / counter.limit)) / 1000


def period_of(kind: Kind, now: datetime) -> str:
    """The current period of a budget; "" for other kinds. `now` is in UTC."""
    if kind not in BUDGETS:
        return ""
    return now.strftime("%Y-%m-%d" if kind.endswith("_day") else "%Y-%m")


def period_end(period: str) -> datetime:
    """The instant at which a day or a month ends."""
    if len(period) > len("2026-11"):
        return datetime.fromisoformat(period).replace(tzinfo=UTC) + timedelta(days=1)
    year, month = map(int, period.split("-"))
    return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)


def refilled(parts: int, elapsed_ms: int, limit: int) -> int:
    """The parts in a bucket after a time."""
    return min(limit * PARTS, parts + max(0, elapsed_ms) * limit)


@dataclass(slots=True)
class _Value:
    value: int
    at_ms: int = 0
    period: str = ""


@dataclass(slots=True)
class MemoryCounters:
    """The counters of one process. A budget begins with `seeds`: what its period had used when the process started."""

    seeds: Mapping[str, int] = field(default_factory=dict)
    clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000
    _values: dict[tuple[str, Kind], _Value] = field(default_factory=dict)

    async def reserve(self, reservation: Reservation) -> tuple[bool, Sequence[int]]:
        pairs = list(zip(reservation.counters, reservation.amounts, strict=True))
        current = [self._current(counter) for counter in reservation.counters]
        if not all(fits(counter, one.value, amount) for (counter, amount), one in zip(pairs, current, strict=True)):
            return False, [one.value for one in current]
        for (counter, amount), one in zip(pairs, current, strict=True):
            _take(one, counter, amount)
        self._prune()
        return True, [one.value for one in current]

    def settle(self, reservation: Reservation, used: Sequence[int]) -> None:
        for counter, amount, spent in zip(reservation.counters, reservation.amounts, used, strict=True):
            current = self._current(counter)
            if current.period == counter.period:  # otherwise the period of the reservation is over
                _take(current, counter, spent - amount)

    async def close(self) -> None:
        """Nothing to close."""

    def _current(self, counter: Counter) -> _Value:
        """The value at this moment. A later period begins at its seed; a reservation of an earlier one leaves it."""
        now = self.clock_ms()
        place = (counter.subject, counter.kind)
        one = self._values.pop(place, None)
        if one is None or one.period < counter.period:
            full = counter.limit * PARTS if counter.kind in BUCKETS else self.seeds.get(counter.name, 0)
            one = _Value(full, now, counter.period)
        if counter.kind in BUCKETS:
            one.value, one.at_ms = refilled(one.value, now - one.at_ms, counter.limit), now
        self._values[place] = one  # the last one of the dictionary is the one that was used last
        return one

    def _prune(self) -> None:
        while len(self._values) > _MOST_COUNTERS:
            del self._values[next(iter(self._values))]


def _take(one: _Value, counter: Counter, amount: int) -> None:
    """Use an amount of a counter, or give a negative amount back. A bucket never has more than its limit."""
    if counter.kind in BUCKETS:
        one.value = min(counter.limit * PARTS, one.value - amount * PARTS)
    else:
        one.value += amount
