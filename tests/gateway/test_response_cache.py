"""Equal deterministic requests are computed once, and no request loses or gets an answer because of another one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve_app.config import CacheOptions
from serve_app.core.cache_status import CacheReport, CacheStatus, current_report
from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.errors import DeadlineExceeded, InternalError, QueueFull
from serve_app.gateway.chain import ModelChain
from serve_app.gateway.response_cache import ResponseCache, SharedCache, open_cache
from tests.gateway.scripted import LAST, KeptMeter, Script, ScriptedEngine, chunk, model, request as any_request

HIT, MISS, BYPASS = CacheStatus.HIT, CacheStatus.MISS, CacheStatus.BYPASS
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class KeptCacheMeter:
    statuses: list[CacheStatus] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    failures: int = 0

    def looked_up(self, model: str, status: CacheStatus) -> None:
        assert model == "m"
        self.statuses.append(status)

    def stored(self, size: int) -> None:
        self.sizes.append(size)

    def failed(self) -> None:
        self.failures += 1


@dataclass
class Cached:
    """A cache in front of an engine that plays a script."""

    script: Script = lambda request: [chunk(), LAST]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meter = KeptCacheMeter()
        self.engine = ScriptedEngine(self.script)
        self.shared = open_cache(CacheOptions(**self.options), self.meter)
        self.stage = ResponseCache(self.engine, model(), self.shared)

    async def get(self, request: GenerationRequest) -> list[Chunk]:
        return [chunk async for chunk in self.stage.generate(request)]


def greedy(id: str = "r", text: str = "hi", **more: Any) -> GenerationRequest:
    timeout_s = more.pop("timeout_s", 30.0)
    request: GenerationRequest = any_request(id, timeout_s=timeout_s)
    return replace(request, prompt=TextPrompt(text), params=GREEDY, **more)


def texts(chunks: list[Chunk]) -> list[str]:
    return ["".join(event.text for event in chunk.events) for chunk in chunks]


@pytest.fixture(autouse=True)
async def _no_task_is_left() -> AsyncIterator[None]:
    yield
    for _ in range(3):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_second_request_gets_the_stored_answer() -> None:
    cached = Cached()
    first = await cached.get(greedy("1"))
    assert first == [chunk(), LAST]
    before = time.monotonic()
    second = await cached.get(again := greedy("2"))
    assert texts(second) == texts(first)
    assert [one.finished for one in second] == [False, True]
    assert all(one.replayed for one in second)
    assert [one.id for one in cached.engine.requests] == ["1"]
    assert cached.meter.statuses == [MISS, HIT]
    for one in second:
        assert 0 <= one.queue_s <= one.events[0].elapsed_s <= time.monotonic() - again.arrived
    assert time.monotonic() - before < 1


@pytest.mark.parametrize(
    "given", [{"params": SamplingParams(temperature=1.0)}, {"cache_control": "no-store"}, {"resumed": (1,)}]
)
async def test_a_request_that_is_not_looked_up_is_computed_each_time(given: dict[str, Any]) -> None:
    cached = Cached()
    for _ in range(2):
        assert await cached.get(replace(greedy(), **given)) == [chunk(), LAST]
    assert len(cached.engine.requests) == 2
    assert cached.meter.statuses == [BYPASS, BYPASS]
    assert cached.meter.sizes == []


async def test_no_store_does_not_read_what_is_stored_and_no_cache_replaces_it() -> None:
    answers = iter(["one", "two", "three"])
    cached = Cached(lambda _: [chunk(next(answers)), LAST])
    assert texts(await cached.get(greedy())) == ["one", "z"]
    assert texts(await cached.get(greedy(cache_control="no-store"))) == ["two", "z"]
    assert texts(await cached.get(greedy())) == ["one", "z"]
    assert texts(await cached.get(greedy(cache_control="no-cache"))) == ["three", "z"]
    assert texts(await cached.get(greedy())) == ["three", "z"]
    assert cached.meter.statuses == [MISS, BYPASS, HIT, MISS, HIT]


@pytest.mark.parametrize(
    "steps", [[QueueFull("full")], [chunk(), InternalError("bug")], [chunk(), ValueError("bug")], [LAST, OSError()]]
)
async def test_an_answer_that_failed_is_not_stored(steps: list[Any]) -> None:
    cached = Cached(lambda _: steps)
    for _ in range(2):
        with pytest.raises(type(steps[-1])):
            await cached.get(greedy())
    assert cached.meter.statuses == [MISS, MISS]
    assert cached.meter.sizes == []


async def test_an_answer_without_an_end_is_not_stored() -> None:
    cached = Cached(lambda _: [chunk()])
    assert await cached.get(greedy()) == [chunk()]
    assert await cached.get(greedy()) == [chunk()]
    assert len(cached.engine.requests) == 2


async def test_an_embedding_is_stored() -> None:
    vector = Chunk((), 3, 0.1, embedding=(0.25, -1.0))
    cached = Cached(lambda _: [vector])
    wanted = replace(greedy(), embed=True, params=SamplingParams())
    await cached.get(wanted)
    (found,) = await cached.get(wanted)
    assert (found.embedding, found.prompt_tokens, found.finished) == ((0.25, -1.0), 3, True)
    assert len(cached.engine.requests) == 1


async def test_a_request_that_arrives_later_gets_the_beginning_at_once_and_the_rest_as_it_comes() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [chunk("a"), chunk("b"), gate, chunk("c"), LAST])
    leader = cached.stage.generate(greedy("1"))
    assert texts([await anext(leader), await anext(leader)]) == ["a", "b"]
    second = replace(greedy("2"), arrived=time.monotonic())
    follower = cached.stage.generate(second)
    begun = [await anext(follower), await anext(follower)]
    assert texts(begun) == ["a", "b"]
    assert all(0 <= one.events[0].elapsed_s < 1 and one.replayed for one in begun)
    gate.set()
    assert texts([one async for one in follower]) == ["c", "z"]
    assert texts([one async for one in leader]) == ["c", "z"]
    assert len(cached.engine.requests) == 1
    assert cached.meter.statuses == [MISS, HIT]


async def test_the_times_of_a_follower_count_from_its_own_arrival() -> None:
    now = time.monotonic()
    events = (TokenEvent(1, "a", 5.0), TokenEvent(2, "b", 9.0, FinishReason.STOP))
    gate = asyncio.Event()
    cached = Cached(lambda _: [gate, Chunk(events, 1, 2.0)])
    first, second = greedy("1", arrived=now - 10), greedy("2", arrived=now - 3)
    both = asyncio.gather(cached.get(first), cached.get(second))
    await asyncio.sleep(0)
    gate.set()
    (leader,), (follower,) = await both
    assert [event.elapsed_s for event in leader.events] == [5.0, 9.0]
    at_join, at_end = (event.elapsed_s for event in follower.events)
    assert at_join == follower.queue_s == pytest.approx(3.0, abs=0.5), "it joined 3 s after its arrival"
    assert at_end == at_join, "9 s after the first arrival is 2 s after the second, before it joined"


@pytest.mark.parametrize("leaving", [0, 1, 2])
async def test_a_client_that_leaves_takes_no_answer_from_the_others(leaving: int) -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [chunk("a"), gate, LAST])
    streams = [cached.stage.generate(greedy(str(number))) for number in range(3)]
    for stream in streams:
        assert texts([await anext(stream)]) == ["a"]
    await streams.pop(leaving).aclose()
    assert cached.engine.running == 1
    gate.set()
    for stream in streams:
        assert texts([one async for one in stream]) == ["z"]
    assert len(cached.engine.requests) == 1
    assert texts(await cached.get(greedy())) == ["a", "z"], "the answer is stored"
    assert cached.meter.statuses[-1] is HIT


async def test_the_computation_ends_when_the_last_client_leaves() -> None:
    cached = Cached(lambda _: [chunk("a"), asyncio.Event()])
    streams = [cached.stage.generate(greedy(str(number))) for number in range(2)]
    for stream in streams:
        await anext(stream)
    await streams[0].aclose()
    assert cached.engine.running == 1
    await streams[1].aclose()
    assert cached.engine.running == 0, "it has ended when the stream is closed"
    cached.engine.script = lambda _: [LAST]
    assert await cached.get(greedy()) == [LAST]
    assert cached.meter.statuses == [MISS, HIT, MISS]


async def test_a_computation_does_not_belong_to_the_call_of_its_first_request() -> None:
    """Ray Serve keeps the calls of a request in the request's context, and cancels them when the client leaves."""
    seen: list[CacheReport | None] = []

    def script(_: GenerationRequest) -> list[Any]:
        seen.append(current_report.get())
        return [LAST]

    current_report.set(CacheReport())
    await Cached(script).get(greedy())
    assert seen == [None]


async def test_a_request_is_cancelled_while_it_waits() -> None:
    cached = Cached(lambda _: [asyncio.Event()])
    task = asyncio.create_task(cached.get(greedy()))
    await asyncio.sleep(0.01)
    assert cached.engine.running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cached.engine.running == 0


async def test_a_request_that_arrives_while_the_computation_is_cancelled_begins_a_new_one() -> None:
    ends = asyncio.Event()

    class Slow(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> Any:
            self.requests.append(request)
            try:
                yield chunk("a")
                await asyncio.Event().wait()
            finally:
                await ends.wait()

    cached = Cached()
    cached.stage.inner = Slow()
    leader = cached.stage.generate(greedy("1"))
    await anext(leader)
    closing = asyncio.create_task(leader.aclose())
    await asyncio.sleep(0.01)
    cached.stage.inner = cached.engine
    assert await cached.get(greedy("2")) == [chunk(), LAST]
    ends.set()
    await closing
    assert (await cached.get(greedy("3")))[0].replayed


async def test_deadlines_are_those_of_each_request() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [chunk("a"), gate, LAST])
    short, long = greedy("1", timeout_s=0.05), greedy("2", timeout_s=30)
    tasks = [asyncio.create_task(cached.get(one)) for one in (short, replace(long, deadline=short.deadline + 0.04))]
    with pytest.raises(DeadlineExceeded):
        await tasks[0]
    assert cached.engine.running == 1
    gate.set()
    assert texts(await tasks[1]) == ["a", "z"], "the first request has ended, the second has its answer"
    assert len(cached.engine.requests) == 1


async def test_a_follower_that_expires_leaves_the_others() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [gate, LAST])
    leader = asyncio.create_task(cached.get(greedy("1")))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):
        await cached.get(greedy("2", timeout_s=0.02))
    gate.set()
    assert await leader == [LAST]


async def test_a_computation_that_would_end_too_early_is_not_followed() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [gate, LAST])
    first = asyncio.create_task(cached.get(greedy("1", timeout_s=1)))
    await asyncio.sleep(0.01)
    (computed,) = cached.engine.requests
    assert computed.deadline - computed.arrived == pytest.approx(2, abs=0.01)
    second = asyncio.create_task(cached.get(greedy("2", timeout_s=10)))
    await asyncio.sleep(0.01)
    assert len(cached.engine.requests) == 2
    gate.set()
    assert (await first, await second) == ([LAST], [LAST])


async def test_an_error_reaches_every_follower() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [chunk("a"), gate, QueueFull("full", retry_after_s=3)])
    tasks = [asyncio.create_task(cached.get(greedy(str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    gate.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(type(error), str(error)) for error in errors] == [(QueueFull, "full")] * 3
    assert all(isinstance(error, QueueFull) and error.retry_after_s == 3 for error in errors)
    assert len({id(error) for error in errors}) == 3


async def test_a_cancellation_within_the_engine_is_an_error_and_not_the_callers() -> None:
    cached = Cached(lambda _: [chunk("a"), asyncio.CancelledError()])
    with pytest.raises(RuntimeError, match="cancelled"):
        await cached.get(greedy())


@pytest.mark.parametrize("different", [{"priority": -1}, {"wake_wait_s": 1.0}, {"cache_control": "no-cache"}])
async def test_a_request_that_waits_in_another_way_has_a_computation_of_its_own(different: dict[str, Any]) -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [gate, LAST])
    cached.engine.state = ModelState.ASLEEP
    tasks = [asyncio.create_task(cached.get(one)) for one in (greedy("1"), greedy("2", **different))]
    await asyncio.sleep(0.01)
    assert len(cached.engine.requests) == 2
    gate.set()
    await asyncio.gather(*tasks)
    assert cached.meter.statuses == [MISS, MISS]
    await cached.get(greedy("3", **{key: value for key, value in different.items() if key != "cache_control"}))
    assert cached.meter.statuses[-1] is HIT, "the stored answer is for all"


async def test_a_whole_answer_follows_a_stream_if_the_model_is_ready() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [gate, LAST])
    tasks = [asyncio.create_task(cached.get(one)) for one in (greedy("1"), greedy("2", wake_wait_s=30.0))]
    await asyncio.sleep(0.01)
    gate.set()
    assert await tasks[0] == [LAST]
    assert texts(await tasks[1]) == ["z"]
    assert cached.meter.statuses == [MISS, HIT]


async def test_an_answer_above_the_limit_reaches_its_request_but_is_not_stored_or_followed() -> None:
    gate = asyncio.Event()
    cached = Cached(lambda _: [chunk("a" * 2000), gate, LAST], {"max_answer_bytes": 1024})
    first = cached.stage.generate(greedy("1"))
    await anext(first)
    second = asyncio.create_task(cached.get(greedy("2")))
    await asyncio.sleep(0.01)
    assert len(cached.engine.requests) == 2
    gate.set()
    assert texts([one async for one in first]) == ["z"]
    assert len(await second) == 2
    assert cached.meter.sizes == []
    assert cached.meter.statuses == [MISS, MISS]


async def test_texts_of_any_characters_are_stored() -> None:
    cached = Cached(lambda _: [chunk("é\ud83d\x00"), LAST])
    first = await cached.get(greedy())
    assert texts(await cached.get(greedy())) == texts(first)


async def test_many_clients_come_and_go_at_random() -> None:
    """64 requests for 4 prompts, a third of which leave at a random moment. All others have the whole answer."""
    draw = random.Random(2)

    def answer(request: GenerationRequest) -> list[Any]:
        assert isinstance(request.prompt, TextPrompt)
        return [step for part in range(5) for step in (draw.random() / 200, chunk(f"{request.prompt.text}{part}"))] + [
            LAST
        ]

    cached = Cached(answer)

    async def client(number: int) -> None:
        await asyncio.sleep(draw.random() / 20)
        prompt, leaves = str(number % 4), number % 3 == 0
        with suppress(TimeoutError):
            async with asyncio.timeout(draw.random() / 50 if leaves else None):
                found = texts(await cached.get(greedy(str(number), prompt)))
                assert found == [*(f"{prompt}{part}" for part in range(5)), "z"]

    await asyncio.gather(*map(client, range(64)))
    assert cached.engine.running == 0
    assert len(cached.engine.requests) < 64
    assert len(cached.meter.statuses) == 64


async def test_a_hit_needs_no_replica_no_place_and_wakes_no_model() -> None:
    engine, meter = ScriptedEngine(), KeptMeter()
    shared = open_cache(CacheOptions(), KeptCacheMeter())
    chain = ModelChain(model(min_replicas=0, places=1, waiting=1), engine, lambda _: meter, print, print, cache=shared)
    chain.update(ModelStatus("m", ModelState.READY), ready=1, ingresses=1)
    expected = [one async for one in chain.engine.generate(greedy())]
    chain.update(ModelStatus("m", ModelState.ASLEEP), ready=0, ingresses=1)
    found = [one async for one in chain.engine.generate(greedy())]
    assert texts(found) == texts(expected)
    assert (len(engine.requests), engine.queries) == (1, []), "nothing was computed or woken"
    assert meter.chunks[-1].replayed
    chain.stop()


async def test_the_caches_of_two_models_share_the_room_but_no_answer() -> None:
    meter = KeptCacheMeter()
    shared: SharedCache = open_cache(CacheOptions(), meter)
    engines = [ScriptedEngine(lambda _, text=text: [chunk(text), LAST]) for text in ("one", "two")]  # type: ignore[misc]
    models = [model(), model().model_copy(update={"source": "builtin:toy"})]
    stages = [ResponseCache(engine, one, shared) for engine, one in zip(engines, models, strict=True)]
    for stage, text in zip([*stages, *stages], ["one", "two"] * 2, strict=True):
        assert texts([one async for one in stage.generate(greedy())])[0] == text
    assert meter.statuses == [MISS, MISS, HIT, HIT]
    assert len(meter.sizes) == 2
    assert meter.sizes[1] == 2 * meter.sizes[0]


async def test_the_status_is_reported_before_the_first_chunk() -> None:
    cached = Cached(lambda _: [asyncio.Event()])
    report = CacheReport()
    current_report.set(report)
    async with aclosing(cached.stage.generate(greedy())) as stream:
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.01)
        assert report.status is MISS
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([], None), ([HIT, HIT], HIT), ([BYPASS], BYPASS), ([HIT, MISS], MISS), ([HIT, BYPASS], MISS)],
)
def test_the_status_of_a_call_with_several_requests(statuses: list[CacheStatus], expected: CacheStatus | None) -> None:
    report = CacheReport()
    for status in statuses:
        report.add(status)
    assert report.status is expected
