"""Counters in a real Redis server that several ingresses share; an ingress is killed, and the server fails."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from serve_app.config import QuotaOptions
from serve_app.gateway import redis_link
from serve_app.gateway.counters import PARTS, Counter, CountersUnavailable, Kind, MemoryCounters, Reservation, period_of
from serve_app.gateway.redis_counters import RedisCounters
from serve_app.quota_config import PASSWORD_VARIABLE
from tests.redis_server import Failures, RedisServer

pytestmark = pytest.mark.slow

MONTH = period_of(Kind.TOKENS_PER_MONTH, datetime.now(UTC))
# A refill of one token a minute: no test lasts that long.
TOKENS = Counter("key:k", Kind.TOKENS_PER_MINUTE, 1)
BUDGET = Counter("tenant:t", Kind.TOKENS_PER_MONTH, 1000, MONTH)
PLACES = Counter("key:k", Kind.CONCURRENT_REQUESTS, 2)
ALL = (BUDGET, PLACES)


@asynccontextmanager
async def opened(
    server: RedisServer, ingress: str = "one", seeds: dict[str, int] | None = None, **options: Any
) -> AsyncIterator[tuple[RedisCounters, Failures]]:
    failures = Failures()
    timeout_s = options.pop("timeout_s", 2.0)
    counters = RedisCounters(
        QuotaOptions(url=server.url, timeout_s=timeout_s, **options), ingress, seeds or {}, failures
    )
    try:
        yield counters, failures
    finally:
        await counters.close()


def reservation(counters: Sequence[Counter], amounts: Sequence[int], used: Sequence[int] = ()) -> Reservation:
    return Reservation(uuid4().hex, tuple(counters), tuple(amounts), lambda: used or [0] * len(amounts))


async def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while True:
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def values(counters: RedisCounters, *which: Counter) -> list[int]:
    granted, found = await counters.reserve(reservation(which, [0] * len(which)))
    assert granted
    return list(found)


async def test_ingresses_count_together_and_all_or_nothing(server: RedisServer) -> None:
    async with opened(server) as (one, _), opened(server, "two") as (two, failures):
        first = reservation(ALL, (600, 1))
        assert await one.reserve(first) == (True, [600, 1])
        assert await two.reserve(reservation(ALL, (401, 1))) == (False, [600, 1])
        assert await two.reserve(reservation(ALL, (400, 1))) == (True, [1000, 2])
        assert await one.reserve(reservation(ALL, (0, 1))) == (False, [1000, 2])
        one.settle(first, (100, 0))
        await until(lambda: _equals(two, [500, 1]))
        assert failures.count == 0


async def _equals(counters: RedisCounters, expected: list[int]) -> bool:
    return await values(counters, *ALL) == expected


async def test_the_scripts_count_as_the_counters_in_memory_do(server: RedisServer) -> None:
    """The same random reservations, on buckets that do not refill during the test."""
    draw, memory = random.Random(7), MemoryCounters(clock_ms=lambda: 0)
    bucket = Counter("key:k", Kind.REQUESTS_PER_MINUTE, 1)
    dollars = Counter("tenant:t", Kind.DOLLARS_PER_MONTH, 9_000_000_000_000, MONTH)
    kinds = (bucket, dollars, PLACES)
    running: list[tuple[Reservation, Reservation]] = []
    async with opened(server) as (shared, failures):
        for _ in range(300):
            amounts = (draw.randint(0, 1) * (draw.random() < 0.1), draw.randint(0, 10**12), draw.randint(0, 1))
            pair = reservation(kinds, amounts), reservation(kinds, amounts)
            found, expected = await shared.reserve(pair[0]), await memory.reserve(pair[1])
            assert found[0] == expected[0]
            assert list(found[1][1:]) == list(expected[1][1:])
            assert 0 <= found[1][0] - expected[1][0] < 60 * 1000, "what the bucket of the server has refilled in 60 s"
            if found[0]:
                running.append(pair)
            if running and draw.random() < 0.6:
                one, other = running.pop(draw.randrange(len(running)))
                used = (one.amounts[0], draw.randint(0, one.amounts[1]), 0)
                shared.settle(one, used)
                memory.settle(other, used)
                await until(lambda: not shared._ended)
        assert failures.count == 0


async def test_a_full_bucket_refills_while_time_passes(server: RedisServer) -> None:
    fast = Counter("key:fast", Kind.TOKENS_PER_MINUTE, 60_000)  # one a millisecond
    async with opened(server) as (counters, _):
        assert (await counters.reserve(reservation([fast], [60_000])))[0]
        began = time.monotonic()
        await asyncio.sleep(0.2)
        (found,) = await values(counters, fast)
        assert 200 * PARTS <= found <= (time.monotonic() - began + 0.05) * 1000 * PARTS


async def test_a_killed_ingress_gives_back_what_it_has_not_used(server: RedisServer) -> None:
    async with opened(server, "two") as (two, _):
        killed = RedisCounters(QuotaOptions(url=server.url, timeout_s=2, lease_s=3), "one", {}, Failures())
        assert (await killed.reserve(reservation(ALL, (900, 1), used=(250, 0))))[0]
        await asyncio.sleep(1.3)  # its lease is renewed with what it has used
        for task in killed._tasks:  # no task of the process runs any more
            task.cancel()
        assert await values(two, *ALL) == [900, 1]
        await asyncio.sleep(3.2)
        assert await values(two, *ALL) == [250, 0]
        await killed._link.close()


async def test_a_reservation_that_ends_after_its_lease_is_counted(server: RedisServer) -> None:
    async with opened(server, lease_s=3) as (one, _), opened(server, "two") as (two, _):
        late = reservation(ALL, (900, 1))
        await one.reserve(late)
        one._tasks[1].cancel()  # the ingress cannot renew its leases
        await asyncio.sleep(3.2)
        assert await values(two, *ALL) == [0, 0]
        one.settle(late, (300, 0))
        await until(lambda: _equals(two, [300, 0]))


async def test_a_budget_begins_with_its_seed(server: RedisServer) -> None:
    async with opened(server, seeds={BUDGET.name: 990}) as (counters, _):
        assert await counters.reserve(reservation([BUDGET], [11])) == (False, [990])
        assert await counters.reserve(reservation([BUDGET], [10])) == (True, [1000])


async def test_namespaces_share_no_counters(server: RedisServer) -> None:
    async with opened(server) as (one, _), opened(server, namespace="b") as (two, _):
        await one.reserve(reservation([BUDGET], [1000]))
        assert await values(two, BUDGET) == [0]


async def test_a_server_that_is_away_refuses_and_is_used_again(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "PING_PAUSE_S", 0.05)
    async with opened(server, timeout_s=0.2) as (counters, failures):
        running = reservation(ALL, (600, 1))
        assert (await counters.reserve(running))[0]
        server.send(signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(CountersUnavailable):
                await counters.reserve(reservation(ALL, (1, 0)))
        assert time.monotonic() - began < 0.2 * 100 / 5, "only the first one waits"
        counters.settle(running, (70, 0))
        server.send(signal.SIGCONT)
        assert failures.count >= 1
        await until(lambda: not counters._link.fails)
        # The first reservation during the outage may have reached the server: it is given back too.
        await until(lambda: _equals(counters, [70, 0]))


async def test_a_server_that_is_away_can_let_requests_through(server: RedisServer) -> None:
    async with opened(server, timeout_s=0.2, when_unavailable="allow") as (counters, _):
        server.kill()
        first = reservation(ALL, (600, 1))
        assert await counters.reserve(first) == (True, [600, 1])
        assert await counters.reserve(reservation(ALL, (401, 1))) == (False, [600, 1]), "this process counts for itself"
        counters.settle(first, (10, 0))
        assert await counters.reserve(reservation(ALL, (990, 1))) == (True, [1000, 1])


async def test_a_cancelled_reservation_is_given_back(server: RedisServer) -> None:
    async with opened(server) as (counters, failures):
        for number in range(50):
            each = reservation([BUDGET], [5])
            task = asyncio.create_task(counters.reserve(each))
            await asyncio.sleep(number % 7 / 2000)
            task.cancel()
            (found,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(found, BaseException):
                assert found[0]
                counters.settle(each, (0,))
        await until(lambda: _equals(counters, [0, 0]))
        assert failures.count == 0


async def test_what_ended_while_the_process_stops_is_sent(server: RedisServer) -> None:
    async with opened(server, "two") as (two, _):
        async with opened(server) as (one, _):
            ended = [reservation(ALL, (10, 0)) for _ in range(90)]
            for each in ended:
                assert (await one.reserve(each))[0]
            for each in ended:
                one.settle(each, (1, 0))
        assert await values(two, *ALL) == [90, 0]


async def test_64_requests_at_once_on_two_ingresses_never_overshoot(server: RedisServer) -> None:
    draw, used = random.Random(3), 0
    async with opened(server) as (one, _), opened(server, "two") as (two, _):

        async def ask(number: int) -> None:
            nonlocal used
            counters = (one, two)[number % 2]
            for _ in range(5):
                each = reservation([BUDGET], [20])
                if not (await counters.reserve(each))[0]:
                    continue
                await asyncio.sleep(draw.random() / 100)
                spent = draw.randint(0, 20)
                used += spent
                counters.settle(each, (spent,))

        await asyncio.gather(*map(ask, range(64)))
        await until(lambda: not one._ended and not two._ended)
        assert await values(one, BUDGET) == [used]
        assert used <= 1000


async def test_the_server_keeps_nothing_for_ever(server: RedisServer) -> None:
    async with opened(server) as (counters, _), Redis.from_url(server.url) as redis:
        both = reservation([TOKENS, *ALL], (1, 1, 1))
        await counters.reserve(both)
        counters.settle(both, (1, 1, 0))
        await until(lambda: not counters._ended)
        names = {name.decode() if isinstance(name, bytes) else name for name in await redis.keys("*")}
        expiring = {name for name in names if await redis.ttl(name) > 0}
        assert names - expiring == {"serve_app:quota::leases"}
        assert await redis.zcard("serve_app:quota::leases") == 1


async def test_the_password_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer(tmp_path, "--requirepass", "s3cret")
    try:
        monkeypatch.setenv(PASSWORD_VARIABLE, "s3cret")
        async with opened(server) as (counters, failures):
            assert (await counters.reserve(reservation(ALL, (1, 1))))[0]
            assert failures.count == 0
    finally:
        server.kill()
