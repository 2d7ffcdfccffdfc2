"""Tenants share a model with the real engine behind the chain: what they get, and how long they wait."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import NativeOptions
from serve_app.core.engine import EngineLoad
from serve_app.core.events import Chunk
from serve_app.core.queries import A, ModelState, ModelStatus, Query
from serve_app.core.requests import GenerationRequest, SamplingParams, TokenPrompt
from serve_app.core.tenants import Limits, Tenant
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.gateway.chain import ModelChain
from tests.gateway.scripted import KeptMeter, model, request

SLOTS = 16


class LocalEngine:
    """A native engine with the toy model in this process, as a stage of the chain."""

    def __init__(self, step_ms: float) -> None:
        options = NativeOptions(max_running=SLOTS, draft_tokens=0)
        self._engine = NativeEngine(lambda: ToyRunner(options, step_ms=step_ms), options)

    async def start(self) -> None:
        await asyncio.to_thread(self._engine.start)

    async def stop(self) -> None:
        await asyncio.to_thread(self._engine.stop)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        stream = TokenStream(request)
        try:
            (refusal,) = await asyncio.to_thread(self._engine.admit, [stream])
            if refusal is not None:
                raise refusal
            async with aclosing(stream.chunks(0.0)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            stream.close()

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        raise AssertionError("these tests make no query")

    def health(self, model: str) -> ModelStatus:
        return ModelStatus(model, ModelState.READY)

    def load(self, model: str) -> EngineLoad:
        return EngineLoad(0, 0, SLOTS)


class Weights:
    """Tenants whose names end with their weight, and tenants of weight 1."""

    def tenant(self, name: str) -> Tenant:
        return Tenant(name, float(name[1:]) if name[1:].isdigit() else 1.0)

    def key_limits(self, key: str) -> Limits:
        return Limits()


class Load:
    """Requests of tenants to one model: the tokens that each tenant has got, and the TTFT of each request."""

    def __init__(self, chains: list[ModelChain]) -> None:
        self._chains = chains
        self._draw = random.Random(1)
        self.tokens: Counter[str] = Counter()
        self.ttft_s: dict[str, list[float]] = {}
        self._grown = asyncio.Event()

    async def send(self, tenant: str, tokens: int, chain: int = 0, prompt: int = 2) -> None:
        one: Any = request(tenant)
        prompted = TokenPrompt(tuple(self._draw.choices(range(256), k=prompt)))
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        one = replace(one, tenant=tenant, params=params, prompt=prompted)
        first = True
        async with aclosing(self._chains[chain].engine.generate(one)) as chunks:
            async for chunk in chunks:
                if first:
                    self.ttft_s.setdefault(tenant, []).append(time.monotonic() - one.arrived)
                first = False
                self.tokens[tenant] += len(chunk.events)
                self._grown.set()

    async def reached(self, tokens: int) -> None:
        """Returns when the tenants have got so many tokens together."""
        while self.tokens.total() < tokens:
            self._grown.clear()
            await self._grown.wait()

    @asynccontextmanager
    async def flood(self, tenant: str, parallel: int, chain: int = 0) -> AsyncIterator[None]:
        """While `parallel` requests of 20 to 60 tokens of the tenant are open."""

        async def repeat() -> None:
            while True:
                await self.send(tenant, self._draw.randint(20, 60), chain)

        tasks = [asyncio.create_task(repeat()) for _ in range(parallel)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def chains(count: int, step_ms: float) -> AsyncIterator[Load]:
    """A model with one replica, behind as many ingresses."""
    engine = LocalEngine(step_ms)
    await engine.start()
    meter, described = KeptMeter(), model(places=64, waiting=256)
    made = [
        ModelChain(described, engine, lambda _: meter, print, lambda: None, tenants=Weights()) for _ in range(count)
    ]
    for chain in made:
        chain.update(ModelStatus("m", ModelState.READY), 1, count, SLOTS)
    yield Load(made)
    for chain in made:
        chain.stop()
    await engine.stop()


@pytest.mark.parametrize(("ingresses", "tolerance"), [(1, 0.05), (2, 0.1)])
async def test_weights_of_1_2_and_4_give_tokens_in_this_proportion(ingresses: int, tolerance: float) -> None:
    """Over 14,000 tokens, without the first second. 16 slots give 3,200 tokens a second."""
    async with chains(ingresses, step_ms=5.0) as load:
        floods = [load.flood(tenant, 30, chain) for chain in range(ingresses) for tenant in ("w1", "w2", "w4")]
        await enter_all(floods)
        await asyncio.sleep(1)
        load.tokens.clear()
        async with asyncio.timeout(40):
            await load.reached(14_000)
        tokens = dict(load.tokens)
        await leave_all(floods)
    print(f"\n{ingresses} ingresses: {tokens}")
    assert tokens["w2"] / tokens["w1"] == pytest.approx(2, rel=tolerance)
    assert tokens["w4"] / tokens["w1"] == pytest.approx(4, rel=tolerance)


async def test_a_light_tenant_waits_at_most_twice_as_long_while_another_floods_50_to_1() -> None:
    """Alone it waits for one step. Beside the flood, the step that runs comes before this one."""
    draw = random.Random(2)
    async with chains(1, step_ms=50.0) as load:
        for _ in range(40):
            await load.send("light", 2, prompt=20)
        alone = load.ttft_s.pop("light")
        floods = [load.flood("flood", 50)]
        await enter_all(floods)
        await asyncio.sleep(1)
        await load.send("light", 2)  # from now on, a slot is kept for it when requests of the flood have ended
        await asyncio.sleep(2)
        load.ttft_s.clear()
        for _ in range(40):
            await load.send("light", 2, prompt=20)
            await asyncio.sleep(draw.uniform(0.05, 0.15))  # at any time of a step
        await leave_all(floods)
    beside = sorted(load.ttft_s["light"])
    print(f"\nTTFT in ms alone: {show(alone)}; beside the flood: {show(beside)}; flood {show(load.ttft_s['flood'])}")
    assert sum(beside) <= 2 * sum(alone)
    assert sum(beside) / len(beside) <= sum(load.ttft_s["flood"]) / len(load.ttft_s["flood"]) / 4


def show(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1e3:.1f}, max {ordered[-1] * 1e3:.1f}"


async def enter_all(managers: list[Any]) -> None:
    for manager in managers:
        await manager.__aenter__()


async def leave_all(managers: list[Any]) -> None:
    for manager in managers:
        await manager.__aexit__(None, None, None)
