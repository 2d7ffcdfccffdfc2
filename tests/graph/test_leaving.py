"""Clients that disconnect: their slots are freed within two steps of the engine."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.graph.service import Service, last_token_after, logged_requests, stream_lines, tokens_after, wait_until_idle

pytestmark = pytest.mark.ray

CONCURRENT = 16


async def cut(client: httpx.AsyncClient, id: str, after: int, timeout_s: float | None) -> float:
    """Disconnects from a long stream after `after` tokens or `timeout_s`. Returns the monotonic instant."""
    body = {"model": "slow", "prompt": "abc", "max_tokens": 1000, "include_text": False}
    read = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            async with client.stream("POST", "/generate_stream", json=body, headers={"x-request-id": id}) as response:
                assert response.status_code == 200
                async for line in stream_lines(response):
                    read += line.startswith("data: ")
                    if read >= after:
                        break
                else:
                    raise AssertionError("a stream of 1000 tokens ended by itself")
    return time.monotonic()


@pytest.mark.perf
@pytest.mark.parametrize("streams", [120, pytest.param(500, marks=pytest.mark.long)])
async def test_streams_cut_at_random_points_free_their_slots(
    client: httpx.AsyncClient, toy_service: Service, token_log: Path, streams: int
) -> None:
    """A fifth is cut within 150 ms, mostly before the first token; the others after 1 to 8 tokens.

    120 streams cover each number of tokens about 12 times and the first 150 ms 24 times.
    """
    rng = random.Random(3)
    concurrent = asyncio.Semaphore(CONCURRENT)

    async def one(i: int) -> tuple[str, float]:
        name, timeout_s = f"cut{streams}-{i}", rng.random() * 0.15 if i % 5 == 0 else None
        async with concurrent:
            return name, await cut(client, f"{name}_", rng.randint(1, 8), timeout_s)

    cuts = dict(await asyncio.gather(*(one(i) for i in range(streams))))
    await wait_until_idle(client, "slow")
    extra = tokens_after(token_log, cuts).values()
    freed_s = sorted(last_token_after(token_log, cuts).values())
    p99_s = freed_s[int(0.99 * (streams - 1))]
    print(f"tokens computed after a cut: {sum(extra) / streams:.2f} on average, {max(extra)} at most")
    print(f"last token after a cut: {freed_s[streams // 2]:.3f} s p50, {p99_s:.3f} s p99, {freed_s[-1]:.3f} s at most")
    assert len(extra) == streams
    assert max(extra) <= 2
    assert p99_s <= 0.5
    errors = [line for line in toy_service.log() if f"cut{streams}-" in line and "ERROR" in line]
    assert errors == [], "a client that leaves is no error"


# Ray Serve knows these two headers.
HEADERS: dict[str, dict[str, str]] = {
    "disconnect-disabled": {"x-request-disconnect-disabled": "?1"},
    "timeout": {"x-request-timeout-seconds": "0"},
}


@pytest.mark.perf
async def test_a_client_that_does_not_stream_frees_its_slot_too(client: httpx.AsyncClient, token_log: Path) -> None:
    """On each path, and with each header that Ray Serve knows."""
    calls: list[tuple[str, str, dict[str, str]]] = [
        *(
            (path.replace("/", "-").replace("_", "-"), path, {})
            for path in ("/generate", "/v1/completions", "/generate_batch")
        ),
        *((name, "/generate", headers) for name, headers in HEADERS.items()),
    ]

    async def leave(name: str, path: str, headers: dict[str, str]) -> tuple[str, float]:
        prompt: dict[str, Any] = {"prompts": ["a"]} if path == "/generate_batch" else {"prompt": "a"}
        body = {"model": "slow", "max_tokens": 1000, **prompt}
        with pytest.raises(httpx.ReadTimeout):
            await client.post(path, json=body, timeout=0.7, headers={"x-request-id": f"{name}_", **headers})
        return name, time.monotonic()

    cuts = dict(await asyncio.gather(*(leave(f"whole-{name}", path, headers) for name, path, headers in calls)))
    await wait_until_idle(client, "slow")
    assert set(cuts) <= logged_requests(token_log), "all of them ran"
    extra = tokens_after(token_log, cuts)
    assert max(extra.values()) <= 2, extra
