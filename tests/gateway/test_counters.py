"""Buckets, budgets and concurrent requests: nothing overshoots, and refunds are exact."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from serve_app.gateway.counters import (
    PARTS,
    Counter,
    Kind,
    MemoryCounters,
    Reservation,
    fits,
    period_end,
    period_of,
    refilled,
    remaining,
    reset_s,
    wait_s,
)

TOKENS = Counter("key:k", Kind.TOKENS_PER_MINUTE, 600)
DAY = Counter("key:k", Kind.TOKENS_PER_DAY, 1000, "2026-11-30")
PLACES = Counter("tenant:t", Kind.CONCURRENT_REQUESTS, 2)
NOW = datetime(2026, 11, 30, 23, 59, 30, tzinfo=UTC)


@dataclass
class Clock:
    ms: int = 0

    def __call__(self) -> int:
        return self.ms


@dataclass
class Counts:
    """Counters with a clock of their own."""

    seeds: dict[str, int] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.counters = MemoryCounters(self.seeds, self.clock)
        self.number = 0

    def reservation(self, *pairs: tuple[Counter, int]) -> Reservation:
        self.number += 1
        counters, amounts = zip(*pairs, strict=True)
        return Reservation(str(self.number), counters, amounts, lambda: amounts)

    async def reserve(self, *pairs: tuple[Counter, int]) -> tuple[bool, list[int]]:
        granted, values = await self.counters.reserve(self.reservation(*pairs))
        return granted, list(values)


async def test_a_bucket_begins_full_and_refills_at_its_rate() -> None:
    counts = Counts()
    assert await counts.reserve((TOKENS, 600)) == (True, [0])
    assert await counts.reserve((TOKENS, 1)) == (False, [0])
    counts.clock.ms = 99
    assert (await counts.reserve((TOKENS, 1)))[0] is False
    counts.clock.ms = 100  # 10 tokens a second
    assert await counts.reserve((TOKENS, 1)) == (True, [0])
    counts.clock.ms = 10**9
    assert await counts.reserve((TOKENS, 0)) == (True, [600 * PARTS])


async def test_all_is_reserved_or_nothing() -> None:
    counts = Counts()
    assert (await counts.reserve((TOKENS, 600), (DAY, 600), (PLACES, 1)))[0]
    counts.clock.ms = 60_000
    assert await counts.reserve((TOKENS, 500), (DAY, 500), (PLACES, 1)) == (False, [600 * PARTS, 600, 1])
    assert await counts.reserve((TOKENS, 400), (DAY, 400), (PLACES, 1)) == (True, [200 * PARTS, 1000, 2])
    assert await counts.reserve((TOKENS, 0), (DAY, 0), (PLACES, 1)) == (False, [200 * PARTS, 1000, 2])


async def test_what_was_not_used_comes_back() -> None:
    counts = Counts()
    reservation = counts.reservation((TOKENS, 500), (DAY, 500), (PLACES, 1))
    await counts.counters.reserve(reservation)
    counts.counters.settle(reservation, (123, 123, 0))
    assert await counts.reserve((TOKENS, 0), (DAY, 0), (PLACES, 0)) == (True, [(600 - 123) * PARTS, 123, 0])


async def test_a_reservation_of_yesterday_gives_nothing_to_today() -> None:
    counts = Counts()
    reservation = counts.reservation((DAY, 900))
    await counts.counters.reserve(reservation)
    tomorrow = Counter("key:k", Kind.TOKENS_PER_DAY, 1000, "2026-12-01")
    assert await counts.reserve((tomorrow, 1000)) == (True, [1000])
    counts.counters.settle(reservation, (0,))
    assert await counts.reserve((tomorrow, 1)) == (False, [1000])


async def test_a_budget_begins_with_what_its_period_has_used() -> None:
    counts = Counts({DAY.name: 990})
    assert await counts.reserve((DAY, 11)) == (False, [990])
    assert await counts.reserve((DAY, 10)) == (True, [1000])
    later = Counter("key:k", Kind.TOKENS_PER_DAY, 1000, "2026-12-01")
    assert await counts.reserve((later, 1000)) == (True, [1000])


async def test_a_limit_that_changes_counts_from_then_on() -> None:
    counts = Counts()
    await counts.reserve((TOKENS, 100))
    lower = Counter("key:k", Kind.TOKENS_PER_MINUTE, 60)
    assert await counts.reserve((lower, 61)) == (False, [60 * PARTS])
    assert await counts.reserve((lower, 60)) == (True, [0])


@pytest.mark.parametrize("seed", range(5))
async def test_10000_requests_never_use_more_than_the_burst_and_the_refill(seed: int) -> None:
    """Up to 500 run at the same time; each uses what it has reserved, or less. The sums are exact."""
    draw, counts = random.Random(seed), Counts()
    limit = draw.choice([60, 997, 100_000])
    bucket = Counter("key:k", Kind.TOKENS_PER_MINUTE, limit)
    budget = Counter("tenant:t", Kind.TOKENS_PER_MONTH, limit * 20, "2026-11")
    places = Counter("tenant:t", Kind.CONCURRENT_REQUESTS, 500)
    running: list[tuple[Reservation, int]] = []
    used = reserved = granted_count = 0
    for _ in range(10_000):
        counts.clock.ms += draw.randrange(0, 200)
        most = draw.randint(1, max(1, limit // 10))
        reservation = counts.reservation((bucket, most), (budget, most), (places, 1))
        granted, values = await counts.counters.reserve(reservation)
        if granted:
            granted_count += 1
            reserved += most
            running.append((reservation, draw.choice([0, most, draw.randint(0, most)])))
        while running and (draw.random() < 0.5 or len(running) >= 500):
            ended, spent = running.pop(draw.randrange(len(running)))
            counts.counters.settle(ended, (spent, spent, 0))
            used += spent
            reserved -= ended.amounts[0]
        assert 0 <= values[0] <= limit * PARTS
        assert used + reserved <= limit + counts.clock.ms * limit // 60_000, "the burst and the refill"
        assert values[1] <= limit * 20
        assert values[2] <= 500
    for ended, _ in running:
        counts.counters.settle(ended, (0, 0, 0))
    assert (await counts.reserve((budget, 0), (places, 0)))[1] == [used, 0], "refunds are exact"
    assert granted_count > 100


@pytest.mark.parametrize("limit", [1, 7, 60, 999_983])
def test_the_wait_is_exact(limit: int) -> None:
    counter = Counter("key:k", Kind.REQUESTS_PER_MINUTE, limit)
    wait = wait_s(counter, 0, 1, NOW)
    assert wait is not None
    elapsed = round(wait * 1000)
    assert fits(counter, refilled(0, elapsed, limit), 1)
    assert not fits(counter, refilled(0, elapsed - 1, limit), 1)
    assert refilled(0, round(reset_s(counter, 0) * 1000), limit) == limit * PARTS


def test_the_wait_for_a_budget_is_the_end_of_its_period() -> None:
    assert wait_s(DAY, 1000, 1, NOW) == 30
    month = Counter("key:k", Kind.DOLLARS_PER_MONTH, 10, "2026-11")
    assert wait_s(month, 10, 1, NOW) == 30
    assert wait_s(DAY, 0, 1001, NOW) is None, "it never fits"
    assert wait_s(PLACES, 2, 1, NOW) == 1


def test_periods_are_those_of_utc() -> None:
    assert period_of(Kind.TOKENS_PER_DAY, NOW) == "2026-11-30"
    assert period_of(Kind.DOLLARS_PER_MONTH, NOW) == "2026-11"
    assert period_of(Kind.TOKENS_PER_MINUTE, NOW) == ""
    assert period_end("2026-12") == datetime(2027, 1, 1, tzinfo=UTC)
    assert period_end("2026-02") == datetime(2026, 3, 1, tzinfo=UTC)
    assert period_end("2026-12-31") == datetime(2027, 1, 1, tzinfo=UTC)


def test_what_remains() -> None:
    assert remaining(TOKENS, 5 * PARTS + 1) == 5
    assert remaining(TOKENS, -5) == 0
    assert remaining(DAY, 1200) == 0
    assert remaining(PLACES, 1) == 1
