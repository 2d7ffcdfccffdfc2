"""The answer of a replica that was lost goes on at another one, and nothing is sent twice or left out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from serve_app.core.events import Chunk, FinishReason, PromptDetails, TokenEvent
from serve_app.core.requests import GenerationRequest, SamplingParams
from serve_app.errors import DeadlineExceeded, InternalError, NotReady, QueueFull
from serve_app.gateway.failover import PAUSES_S, Failover
from tests.gateway.scripted import ScriptedEngine, Step, request

LOST = NotReady("lost", retry_after_s=1)
FULL = QueueFull("full", retry_after_s=1)


def tokens(*ids: int, end: bool = False, queue_s: float = 0.0, **facts: Any) -> Chunk:
    events = [TokenEvent(one, chr(96 + one), 0.1) for one in ids]
    if end:
        events[-1] = replace(events[-1], finish_reason=FinishReason.STOP)
    return Chunk(tuple(events), 3, queue_s, **facts)


class Replicas:
    """Each attempt plays the next script, and the last one from then on."""

    def __init__(
        self, *scripts: Callable[[GenerationRequest], Iterable[Step]] | list[Step], seeds: bool = True
    ) -> None:
        self._scripts = list(scripts)
        self.resumed = 0
        self.engine = ScriptedEngine(self._play)
        self.stage = Failover(self.engine, self._count, seeds)

    def _play(self, request: GenerationRequest) -> Iterable[Step]:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        return script if isinstance(script, list) else script(request)

    def _count(self) -> None:
        self.resumed += 1

    async def chunks(self, request: GenerationRequest) -> list[Chunk]:
        return [chunk async for chunk in self.stage.generate(request)]


def ids(chunks: Iterable[Chunk]) -> list[int]:
    return [event.token_id for chunk in chunks for event in chunk.events]


async def test_an_answer_goes_on_after_its_last_token() -> None:
    replicas = Replicas([tokens(1, 2), tokens(3), LOST], [tokens(4), tokens(5, end=True)])
    chunks = await replicas.chunks(request())
    assert ids(chunks) == [1, 2, 3, 4, 5]
    first, second = replicas.engine.requests
    assert (first.resumed, second.resumed) == ((), (1, 2, 3))
    assert replace(second, resumed=()) == first, "prompt, seed, deadline and all else are the same"
    assert replicas.resumed == 1
    assert replicas.engine.running == 0


async def test_a_second_replica_that_is_lost_adds_to_the_answer() -> None:
    replicas = Replicas([tokens(1), LOST], [tokens(2), LOST], [LOST], [tokens(3, end=True)])
    assert ids(await replicas.chunks(request())) == [1, 2, 3]
    assert [one.resumed for one in replicas.engine.requests] == [(), (1,), (1, 2), (1, 2)]


async def test_a_request_that_ends_every_replica_is_not_sent_to_all() -> None:
    replicas = Replicas([LOST])
    with pytest.raises(NotReady):
        await replicas.chunks(request())
    assert len(replicas.engine.requests) == 1 + len(PAUSES_S)


async def test_the_facts_of_the_first_attempt_are_kept() -> None:
    prompt = PromptDetails(text="hi")
    late = tokens(2, end=True, queue_s=9.0, cached_tokens=1, prompt=prompt, began_ns=8)
    replicas = Replicas([tokens(1, queue_s=0.5, cached_tokens=2, prompt=prompt, began_ns=7), LOST], [late])
    wanted = replace(request(), prompt_details=True, params=SamplingParams(prompt_logprobs=1))
    first, second = await replicas.chunks(wanted)
    assert (first.prompt, first.queue_s, first.cached_tokens, first.began_ns) == (prompt, 0.5, 2, 7)
    assert (second.prompt, second.queue_s, second.cached_tokens, second.began_ns) == (None, 0.5, 2, 0)
    again = replicas.engine.requests[1]
    assert (again.prompt_details, again.params.prompt_logprobs) == (False, None)


async def test_a_request_without_a_token_so_far_is_sent_again_as_it_was() -> None:
    replicas = Replicas([LOST], [tokens(1, end=True, prompt=PromptDetails(text="hi"))])
    wanted = replace(request(), prompt_details=True)
    (chunk,) = await replicas.chunks(wanted)
    assert chunk.prompt is not None
    first, second = replicas.engine.requests
    assert first == second


@pytest.mark.parametrize("seeds", [True, False])
async def test_a_sampled_request_keeps_one_seed(seeds: bool) -> None:
    replicas = Replicas([tokens(1), LOST], [tokens(2, end=True)], seeds=seeds)
    await replicas.chunks(request())
    first, second = (one.params.seed for one in replicas.engine.requests)
    assert first == second
    assert (first is not None) == seeds


async def test_a_seed_of_the_caller_and_a_greedy_request_stay() -> None:
    replicas = Replicas([tokens(1, end=True)])
    await replicas.chunks(replace(request(), params=SamplingParams(seed=5)))
    await replicas.chunks(replace(request(), params=SamplingParams(temperature=0.0)))
    assert [one.params.seed for one in replicas.engine.requests] == [5, None]


@pytest.mark.parametrize("error", [InternalError("bug"), QueueFull("full"), DeadlineExceeded("late"), ValueError()])
async def test_other_errors_are_not_retried(error: Exception) -> None:
    replicas = Replicas([error])
    with pytest.raises(type(error)):
        await replicas.chunks(request())
    assert len(replicas.engine.requests) == 1


async def test_a_resumed_request_waits_until_the_other_replicas_have_room() -> None:
    replicas = Replicas([tokens(1), LOST], [FULL], [FULL], [FULL], [FULL], [tokens(2, end=True)])
    assert ids(await replicas.chunks(request())) == [1, 2]
    assert replicas.resumed == 1


async def test_nothing_is_sent_again_after_the_deadline() -> None:
    late = replace(request(timeout_s=0.05), params=SamplingParams(temperature=0.0))
    replicas = Replicas([tokens(1), 0.06, LOST])
    with pytest.raises(NotReady):
        await replicas.chunks(late)
    assert len(replicas.engine.requests) == 1
    full = Replicas([tokens(1), LOST], [FULL])
    began = time.monotonic()
    with pytest.raises(QueueFull):
        await full.chunks(request(timeout_s=1.2))
    assert time.monotonic() - began < 1.2


async def test_an_error_after_the_last_token_is_not_retried() -> None:
    replicas = Replicas([tokens(1, end=True), LOST])
    with pytest.raises(NotReady):
        await replicas.chunks(request())
    assert len(replicas.engine.requests) == 1


async def test_a_client_that_leaves_ends_the_attempt() -> None:
    replicas = Replicas([tokens(1), LOST], [tokens(2), asyncio.Event()])
    stream = replicas.stage.generate(request())
    assert ids([await anext(stream), await anext(stream)]) == [1, 2]
    assert replicas.engine.running == 1
    await stream.aclose()
    assert replicas.engine.running == 0
