"""Answers in a real Redis server, which fails, hangs and comes back."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from serve_app.cache_config import PASSWORD_VARIABLE
from serve_app.config import CacheOptions
from serve_app.core.cache_status import CacheStatus
from serve_app.gateway import redis_link
from serve_app.gateway.redis_store import RedisStore
from serve_app.gateway.response_cache import ResponseCache, open_cache
from tests.gateway.scripted import LAST, ScriptedEngine, chunk, model
from tests.gateway.test_response_cache import HIT, MISS, KeptCacheMeter, greedy, texts
from tests.redis_server import Failures, RedisServer

pytestmark = pytest.mark.slow

KEY, OTHER = b"k" * 32, b"o" * 32
# A request waits for the server this long at most: long where the server answers, short where it does not.
LONG_S, SHORT_S = 1.0, 0.2
# Room for a machine whose cores are busy.
ROOM_S = 2.0


@asynccontextmanager
async def opened(url: str, timeout_s: float = LONG_S, **options: Any) -> AsyncIterator[tuple[RedisStore, Failures]]:
    failures = Failures()
    store = RedisStore(CacheOptions(url=url, timeout_s=timeout_s, **options), failures)
    try:
        yield store, failures
    finally:
        await store.close()


async def test_answers_are_kept_for_all_stores_of_a_server_until_they_expire(server: RedisServer) -> None:
    async with opened(server.url, ttl_s=1) as (one, failures), opened(server.url) as (two, _):
        assert await one.get(KEY) is None
        await one.put(KEY, b"\x00answer\xff")
        assert await two.get(KEY) == b"\x00answer\xff"
        assert await two.get(OTHER) is None
        await asyncio.sleep(1.1)
        assert await two.get(KEY) is None
        assert failures.count == 0


async def test_100_calls_at_the_same_time_share_few_connections(server: RedisServer) -> None:
    async with opened(server.url) as (store, failures):
        await asyncio.gather(*(store.put(bytes([number]) * 32, bytes([number])) for number in range(100)))
        found = await asyncio.gather(*(store.get(bytes([number]) * 32) for number in range(100)))
        assert found == [bytes([number]) for number in range(100)]
        assert failures.count == 0
        async with Redis.from_url(server.url) as redis:
            assert len(await redis.client_list()) <= 17


async def test_bytes_that_were_not_stored_for_a_key_are_no_answer(server: RedisServer) -> None:
    async with opened(server.url) as (store, failures), Redis.from_url(server.url) as redis:
        await store.put(KEY, b"answer")
        names = sorted(await redis.keys("*"))
        assert names == [b"serve_app:answer:" + KEY.hex().encode()]
        sealed = await redis.get(names[0])
        assert isinstance(sealed, bytes)
        for wrong in (b"", b"x", sealed[:-1], sealed + b"x", b"x" + sealed):
            await redis.set(names[0], wrong)
            assert await store.get(KEY) is None
        await redis.set(b"serve_app:answer:" + OTHER.hex().encode(), sealed)
        assert await store.get(OTHER) is None, "the answer to another key"
        assert failures.count == 6
        await redis.set(names[0], sealed)
        assert await store.get(KEY) == b"answer", "the server is not considered to fail"


async def test_calls_that_are_cancelled_mix_up_no_answers(server: RedisServer) -> None:
    async with opened(server.url) as (store, failures):
        await store.put(KEY, b"k" * 100_000)
        await store.put(OTHER, b"o" * 100_000)

        async def get(number: int) -> None:
            key = KEY if number % 2 else OTHER
            task = asyncio.create_task(store.get(key))
            if number % 3 == 0:
                await asyncio.sleep(number % 7 / 5000)
                task.cancel()
            found = (await asyncio.gather(task, return_exceptions=True))[0]
            assert found == key[:1] * 100_000 or isinstance(found, asyncio.CancelledError)

        for _ in range(5):
            await asyncio.gather(*map(get, range(40)))
        assert failures.count == 0


async def test_a_server_that_is_killed_costs_nothing_and_is_used_again_when_it_is_back(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_link, "PING_PAUSE_S", 0.05)
    caplog.set_level(logging.INFO)
    async with opened(server.url) as (store, failures):
        await store.put(KEY, b"answer")
        server.kill()
        began = time.monotonic()
        for _ in range(100):
            assert await store.get(KEY) is None
            await store.put(KEY, b"answer")
        assert time.monotonic() - began < LONG_S + ROOM_S
        assert failures.count >= 1
        await until(lambda: failures.count >= 4)  # PINGs go on
        assert sum("requests go on without it" in line for line in caplog.messages) == 1
        server.start()
        await until(lambda: not store._link.fails)
        await store.put(KEY, b"new")
        assert await store.get(KEY) == b"new"
        assert sum("answers again" in line for line in caplog.messages) == 1


async def test_a_server_that_hangs_delays_one_round_of_requests_and_no_other(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "PING_PAUSE_S", 0.05)
    async with opened(server.url, SHORT_S) as (store, failures):
        await store.put(KEY, b"answer")
        server.send(signal.SIGSTOP)
        began = time.monotonic()
        assert await asyncio.gather(*(store.get(KEY) for _ in range(50))) == [None] * 50
        assert time.monotonic() - began < SHORT_S + ROOM_S
        began = time.monotonic()
        for _ in range(100):
            assert await store.get(KEY) is None
        assert time.monotonic() - began < 100 * SHORT_S / 5, "they do not wait"
        assert failures.count >= 1
        server.send(signal.SIGCONT)
        end = time.monotonic() + 10
        while await store.get(KEY) != b"answer":
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def test_a_server_without_memory_for_answers_costs_no_request(server: RedisServer) -> None:
    async with opened(server.url) as (store, failures):
        async with Redis.from_url(server.url) as redis:
            await redis.config_set("maxmemory", 1)
            await redis.config_set("maxmemory-policy", "noeviction")
        await store.put(KEY, b"answer")
        assert failures.count == 1
        assert await store.get(KEY) is None


async def test_the_password_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path, "--requirepass", "s3cret")
    try:
        monkeypatch.setenv(PASSWORD_VARIABLE, "s3cret")
        async with opened(server.url) as (store, failures):
            await store.put(KEY, b"answer")
            assert await store.get(KEY) == b"answer"
            assert failures.count == 0
        monkeypatch.setenv(PASSWORD_VARIABLE, "wr0ng")
        async with opened(server.url) as (store, failures):
            assert await store.get(KEY) is None
            assert failures.count == 1
        assert "wr0ng" not in caplog.text
    finally:
        server.kill()


async def test_two_ingresses_share_their_answers(server: RedisServer) -> None:
    meter = KeptCacheMeter()
    engine = ScriptedEngine(lambda _: [chunk("a"), LAST])
    caches = [open_cache(CacheOptions(url=server.url, timeout_s=LONG_S), meter) for _ in range(2)]
    stages = [ResponseCache(engine, model(), cache) for cache in caches]
    for stage in stages:
        assert texts([one async for one in stage.generate(greedy())]) == ["a", "z"]
    assert meter.statuses == [MISS, HIT]
    assert (len(engine.requests), meter.failures, meter.sizes) == (1, 0, [])
    for cache in caches:
        await cache.store.close()


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_requests_are_answered_without_the_server(server: RedisServer, fault: str) -> None:
    meter = KeptCacheMeter()
    engine = ScriptedEngine(lambda _: [chunk("a"), 0.5, LAST])
    cache = open_cache(CacheOptions(url=server.url, timeout_s=SHORT_S), meter)
    stage = ResponseCache(engine, model(), cache)

    async def ask(number: int) -> list[str]:
        return texts([one async for one in stage.generate(greedy(text=str(number // 2)))])

    assert await ask(0) == ["a", "z"]
    if fault == "killed":
        server.kill()
    else:
        server.send(signal.SIGSTOP)
    began = time.monotonic()
    assert await asyncio.gather(*map(ask, range(2, 22))) == [["a", "z"]] * 20
    assert time.monotonic() - began < 2 * SHORT_S + 0.5 + ROOM_S
    assert meter.failures >= 1
    assert meter.statuses.count(CacheStatus.HIT) == 10, "twins still follow each other"
    assert engine.running == 0
    await cache.store.close()
    server.send(signal.SIGCONT) if fault == "stopped" else None


async def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
