"""The mixed load against the HTTP application and the native engine in this process: no Ray, and nothing is left."""

from __future__ import annotations

import asyncio
from functools import partial

import httpx

from serve_app.engines.toy import ToyRunner
from tests.api.scripted import ScriptedTelemetry
from tests.api.server import served
from tests.api.toy import ToyEngine
from tests.chaos.load import Load, undisturbed
from tests.chaos.network import Link
from tests.engines.native.helpers import running
from tests.graph.service import wait_until

MODEL = "small"
QUICK = (Load.disconnects, Load.crashes, Load.reads_slowly, Load.sends_garbage, Load.loses_its_network)


async def test_every_request_of_a_mixed_load_ends_once_and_nothing_is_left() -> None:
    """120 requests, a third of them with a fault: no slot, no block of the KV cache and no task stays in use."""
    with running(partial(ToyRunner, step_ms=2), max_running=64, max_context=1024) as native:
        async with (
            served(ToyEngine(native=native), ScriptedTelemetry()) as url,
            httpx.AsyncClient(base_url=url) as client,
        ):
            port = httpx.URL(url).port
            assert port is not None
            expected = await undisturbed(client, MODEL)
            before = len(asyncio.all_tasks())
            async with Link(port) as link:
                load = Load(client, link, port, expected, 40, 0.33, seed=7, model=MODEL, faults=QUICK)
                async with load:
                    await wait_until(lambda: reached(load, 120), seconds=60)
            assert load.hung == 0
            assert set(load.kinds) == {"answered", "left"}, [one for one in load.outcomes if one.kind == "wrong"]
            assert load.kinds["left"] >= 20
            assert {one.name for one in load.outcomes if one.kind == "left"} >= {"crash", "disconnect", "garbage"}

            async def idle() -> bool:
                stats = native.stats()
                busy = (stats.running, stats.waiting, stats.tokens_held)
                return not any(busy) and len(asyncio.all_tasks()) <= before

            await wait_until(idle)


async def reached(load: Load, count: int) -> bool:
    return len(load.outcomes) >= count
