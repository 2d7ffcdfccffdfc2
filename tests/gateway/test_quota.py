"""The stage that reserves what a request can use, and gives back what it has not, however the request ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve_app.config import CacheOptions, Price, QuotaOptions
from serve_app.core.events import Chunk, FinishReason, ReasoningDelta, TextDelta, TokenEvent
from serve_app.core.queries import ModelInfo
from serve_app.core.quotas import CallQuota, current_call
from serve_app.core.requests import GenerationRequest, TextPrompt, TokenPrompt
from serve_app.core.tenants import Limits, Tenant
from serve_app.core.usage import Usage
from serve_app.errors import InsufficientQuota, InternalError, PromptTooLong, RateLimitExceeded
from serve_app.gateway.counters import MemoryCounters
from serve_app.gateway.quota import Quota
from serve_app.gateway.response_cache import ResponseCache, open_cache
from serve_app.gateway.shared_quotas import SharedQuotas
from tests.gateway.scripted import LAST, ScriptedEngine, chunk, model, request
from tests.gateway.test_response_cache import KeptCacheMeter

CONTEXT = 1000


@dataclass
class ScriptedTenants:
    of_key: Limits = field(default_factory=Limits)
    of_tenant: Limits = field(default_factory=Limits)

    def tenant(self, name: str) -> Tenant:
        return Tenant(name, limits=self.of_tenant)

    def key_limits(self, key: str) -> Limits:
        return self.of_key


@dataclass
class KeptUsage:
    rows: list[Usage] = field(default_factory=list)

    def record(self, usage: Usage) -> None:
        self.rows.append(usage)


@dataclass
class KeptQuotaMeter:
    refusals: list[tuple[str, str]] = field(default_factory=list)

    def refused(self, subject: str, kind: str) -> None:
        self.refusals.append((subject, kind))

    def store_failed(self) -> None:
        """No server is in these tests."""


def engine_with(prompt_tokens: int, *texts: str, **options: Any) -> ScriptedEngine:
    """Refuses prompts over the reservation, as an engine does, and answers with a chunk for each text."""

    def script(one: GenerationRequest) -> list[Any]:
        if one.prompt_limit is not None and prompt_tokens > one.prompt_limit:
            return [PromptTooLong("over", "prompt", None, prompt_tokens, one.prompt_limit, over_reservation=True)]
        last = len(texts) - 1
        return [
            replace(chunk(text, FinishReason.STOP if number == last else None), prompt_tokens=prompt_tokens)
            for number, text in enumerate(texts)
        ]

    return ScriptedEngine(script, ModelInfo(CONTEXT, 300, frozenset()), **options)


class Limited:
    """A quota stage, and what it tells others."""

    def __init__(
        self,
        engine: ScriptedEngine,
        of_key: Limits = Limits(),  # noqa: B008 (frozen)
        of_tenant: Limits = Limits(),  # noqa: B008
        price: Price = Price(),  # noqa: B008
        cache: bool = False,
        **options: Any,
    ) -> None:
        self.engine, self.usage, self.meter = engine, KeptUsage(), KeptQuotaMeter()
        self.tenants = ScriptedTenants(of_key, of_tenant)
        self.ms = 0
        self.counters = MemoryCounters(clock_ms=lambda: self.ms)
        shared = SharedQuotas(QuotaOptions(**options), self.tenants, self.counters, self.usage, self.meter)
        priced = model().model_copy(update={"price": price})
        inner: Any = engine
        if cache:
            inner = ResponseCache(engine, priced, open_cache(CacheOptions(), KeptCacheMeter()))
        self.stage = Quota(inner, priced, shared)

    async def ask(self, one: GenerationRequest) -> list[Chunk]:
        return [part async for part in self.stage.generate(one)]

    def values(self) -> dict[str, int]:
        """The counters, in their units."""
        return {f"{subject}:{kind}": one.value for (subject, kind), one in self.counters._values.items()}

    def tokens_left(self) -> int:
        return self.values()["key:k:tokens_per_minute"] // 60_000


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not happen")


def ask(text: str = "hi", max_tokens: int | None = 10, **fields: Any) -> GenerationRequest:
    one: GenerationRequest = request()
    params = replace(one.params, max_tokens=max_tokens)
    return replace(one, prompt=TextPrompt(text), params=params, tenant="t", key="k", **fields)


async def test_a_request_without_an_identity_is_passed_on() -> None:
    limited = Limited(engine_with(3, "a"), Limits(requests_per_minute=1), Limits(tokens_per_day=1))
    for _ in range(3):
        assert len(await limited.ask(request())) == 1
    assert limited.usage.rows == []
    assert limited.engine.queries == []


async def test_a_key_without_limits_has_its_usage_kept_and_nothing_counted() -> None:
    limited = Limited(engine_with(3, "a", "b"), price=Price(input_per_million=1, output_per_million=2))
    await limited.ask(ask())
    assert limited.usage.rows == [Usage("t", "k", "m", 3, 0, 2, 0, 3 * 1000 + 2 * 2000)]
    assert limited.values() == {}
    assert limited.engine.requests[0].prompt_limit is None


async def test_the_unused_part_comes_back_to_the_key_and_to_the_tenant() -> None:
    limited = Limited(
        engine_with(3, "a", "b"),
        Limits(tokens_per_minute=600, concurrent_requests=1),
        Limits(tokens_per_day=1000, dollars_per_month=1, requests_per_minute=10),
        Price(input_per_million=10, output_per_million=20),
    )
    await limited.ask(ask(max_tokens=500))
    assert limited.values() == {
        "key:k:tokens_per_minute": (600 - 5) * 60_000,
        "key:k:concurrent_requests": 0,
        "tenant:t:requests_per_minute": 9 * 60_000,
        "tenant:t:tokens_per_day": 5,
        "tenant:t:dollars_per_month": 3 * 10_000 + 2 * 20_000,
    }


@pytest.mark.parametrize("end", ["error", "disconnect", "cancel", "before"])
async def test_however_a_request_ends_it_costs_what_it_has_received(end: str) -> None:
    gate = asyncio.Event()
    scripts: dict[str, list[Any]] = {
        "error": [chunk("a"), InternalError("bug")],
        "disconnect": [chunk("a"), gate],
        "cancel": [chunk("a"), gate],
        "before": [InternalError("full")],
    }
    engine = ScriptedEngine(lambda _: scripts[end], ModelInfo(CONTEXT, 300, frozenset()))
    limited = Limited(engine, Limits(tokens_per_minute=600, concurrent_requests=1))
    if end == "disconnect":
        async with aclosing(limited.stage.generate(ask())) as chunks:
            await anext(chunks)
    elif end == "cancel":
        task = asyncio.create_task(limited.ask(ask()))
        await until(lambda: bool(engine.requests))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    else:
        with pytest.raises(InternalError):
            await limited.ask(ask())
    used = 0 if end == "before" else 2  # one token of the prompt, one of the answer
    assert limited.tokens_left() == 600 - used
    assert limited.values()["key:k:concurrent_requests"] == 0
    assert [row.prompt_tokens + row.output_tokens for row in limited.usage.rows] == [used]


async def test_a_longer_prompt_than_expected_is_reserved_before_it_is_computed() -> None:
    limited = Limited(
        engine_with(400, "a"), Limits(tokens_per_minute=900, requests_per_minute=10, concurrent_requests=1)
    )
    await limited.ask(ask())
    first, second = limited.engine.requests
    assert first.prompt_limit is not None
    assert first.prompt_limit < 400
    assert second.prompt_limit == 400
    assert limited.tokens_left() == 900 - 401
    assert limited.values()["key:k:requests_per_minute"] == 9 * 60_000, "it is one request"
    assert len(limited.usage.rows) == 1
    await limited.ask(ask(max_tokens=1))
    assert len(limited.engine.requests) == 3, "the estimate has learned"


async def test_a_prompt_that_the_limit_does_not_allow_is_never_computed() -> None:
    limited = Limited(engine_with(700, "a"), Limits(tokens_per_minute=600))
    with pytest.raises(RateLimitExceeded, match="request can use up to 710") as error:
        await limited.ask(ask())
    assert error.value.retry_after_s is None, "it would never fit"
    assert limited.tokens_left() == 600
    assert limited.usage.rows == []


async def test_an_error_of_the_engine_about_the_context_is_passed_on() -> None:
    refusal = PromptTooLong("long", "prompt", None, 2000, CONTEXT)
    limited = Limited(
        ScriptedEngine(lambda _: [refusal], ModelInfo(CONTEXT, 300, frozenset())), Limits(tokens_per_day=9000)
    )
    with pytest.raises(PromptTooLong):
        await limited.ask(ask())
    assert len(limited.engine.requests) == 1


async def test_requests_a_minute() -> None:
    limited = Limited(engine_with(1, "a"), Limits(requests_per_minute=2))
    for _ in range(2):
        await limited.ask(ask())
    with pytest.raises(RateLimitExceeded, match="limit of 2 requests per minute") as error:
        await limited.ask(ask())
    assert error.value.retry_after_s == 30
    limited.ms = 30_000
    await limited.ask(ask())
    assert limited.meter.refusals == [("key", "requests_per_minute")]
    assert limited.engine.queries == [], "the length of a request does not matter"


async def test_concurrent_requests() -> None:
    gate = asyncio.Event()
    engine = ScriptedEngine(lambda _: [gate, LAST])
    limited = Limited(engine, of_tenant=Limits(concurrent_requests=2))
    running = [asyncio.create_task(limited.ask(ask())) for _ in range(2)]
    await until(lambda: len(engine.requests) == 2)
    with pytest.raises(RateLimitExceeded, match="tenant has 2 concurrent"):
        await limited.ask(ask())
    gate.set()
    await asyncio.gather(*running)
    await limited.ask(ask())


async def test_a_used_up_budget_is_another_error() -> None:
    limited = Limited(engine_with(3, "a", "b"), of_tenant=Limits(tokens_per_month=20))
    for _ in range(2):
        await limited.ask(ask(max_tokens=2))
    with pytest.raises(InsufficientQuota, match="limit of the tenant is 20 tokens per month") as error:
        await limited.ask(ask(max_tokens=10))
    assert error.value.retry_after_s is not None
    assert error.value.retry_after_s > 0


async def test_dollars_are_counted_by_the_price() -> None:
    price = Price(input_per_million=1000, cached_input_per_million=100, output_per_million=4000)
    limited = Limited(engine_with(3, "a", "b"), Limits(dollars_per_day=1), price=price)
    await limited.ask(ask(max_tokens=2))
    assert limited.values()["key:k:dollars_per_day"] == 3 * 1_000_000 + 2 * 4_000_000
    with pytest.raises(InsufficientQuota, match="dollars per day"):
        await limited.ask(ask(max_tokens=250))


async def test_without_max_tokens_the_context_is_reserved() -> None:
    limited = Limited(engine_with(3, "a"), Limits(tokens_per_minute=10_000, tokens_per_day=10_000))
    running = limited.stage.generate(ask(max_tokens=None))
    await anext(running)
    assert limited.values()["key:k:tokens_per_day"] == CONTEXT
    assert limited.engine.requests[0].params.max_tokens is None
    await running.aclose()
    assert limited.values()["key:k:tokens_per_day"] == 4


async def test_without_max_tokens_the_answer_is_as_long_as_the_budget_leaves() -> None:
    limited = Limited(engine_with(3, "a"), Limits(tokens_per_day=300))
    await limited.ask(ask(max_tokens=None))
    bounded = limited.engine.requests[0]
    assert bounded.params.max_tokens is not None
    assert bounded.prompt_limit is not None
    assert bounded.params.max_tokens + bounded.prompt_limit == 300
    limited.tenants.of_key = Limits(tokens_per_day=50)
    with pytest.raises(InsufficientQuota):  # an answer of less than 64 tokens
        await limited.ask(ask(max_tokens=None))


async def test_without_max_tokens_the_answer_fits_into_the_tokens_a_minute() -> None:
    limited = Limited(engine_with(3, "a"), Limits(tokens_per_minute=500))
    await limited.ask(ask(max_tokens=None))
    bounded = limited.engine.requests[0]
    assert bounded.params.max_tokens is not None
    assert bounded.params.max_tokens + (bounded.prompt_limit or 0) == 500
    with pytest.raises(RateLimitExceeded):  # 496 are left, and the next moment has more: the answer is not cut
        await limited.ask(ask(max_tokens=None))


async def test_the_operator_can_set_the_length_of_answers_without_max_tokens() -> None:
    limited = Limited(engine_with(3, "a"), Limits(tokens_per_minute=5000), default_max_tokens=77)
    await limited.ask(ask(max_tokens=None))
    assert limited.engine.requests[0].params.max_tokens == 77


async def test_an_embedding_reserves_its_prompt() -> None:
    found = Chunk((), prompt_tokens=30, queue_s=0.0, embedding=(1.0,))
    limited = Limited(
        ScriptedEngine(lambda _: [found], ModelInfo(CONTEXT, 300, frozenset())), Limits(tokens_per_day=40)
    )
    prompt = TokenPrompt(tuple(range(30)))
    await limited.ask(replace(ask(max_tokens=None), prompt=prompt, embed=True))
    assert limited.values()["key:k:tokens_per_day"] == 30
    with pytest.raises(InsufficientQuota):
        await limited.ask(replace(ask(max_tokens=None), prompt=prompt, embed=True))


async def test_a_call_with_several_answers_is_one_request() -> None:
    gate = asyncio.Event()
    engine = ScriptedEngine(lambda one: [LAST] if one.id == "0" else [gate, LAST], ModelInfo(CONTEXT, 300, frozenset()))
    limited = Limited(engine, Limits(requests_per_minute=2, concurrent_requests=1, tokens_per_minute=900))

    async def call() -> CallQuota:
        quota = CallQuota()
        current_call.set(quota)
        answers = [asyncio.create_task(limited.ask(ask(id=str(number)))) for number in range(3)]
        await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert limited.values()["key:k:concurrent_requests"] == 1, "the call still runs"
        gate.set()
        await asyncio.gather(*answers)
        return quota

    quota = await asyncio.create_task(call())
    assert limited.values() == {
        "key:k:requests_per_minute": 60_000,
        "key:k:concurrent_requests": 0,
        "key:k:tokens_per_minute": (900 - 6) * 60_000,
    }
    assert quota.requests is not None
    assert (quota.requests.limit, quota.requests.remaining) == (2, 1)
    assert len(limited.usage.rows) == 3


async def test_a_call_knows_the_limits_that_leave_the_least() -> None:
    limited = Limited(
        engine_with(1, "a"),
        Limits(requests_per_minute=10, tokens_per_minute=1000),
        Limits(requests_per_minute=5, tokens_per_minute=5000),
    )
    quota = CallQuota()
    current_call.set(quota)
    await limited.ask(ask())
    assert quota.requests is not None
    assert quota.tokens is not None
    assert (quota.requests.limit, quota.requests.remaining, quota.requests.reset_s) == (5, 4, 12)
    assert quota.tokens.limit == 1000
    assert quota.tokens.remaining < 1000
    current_call.set(None)


async def test_an_answer_from_the_cache_costs_a_request_and_no_tokens() -> None:
    limited = Limited(engine_with(3, "a", "b"), Limits(requests_per_minute=10, tokens_per_minute=600), cache=True)
    one = ask()
    greedy = replace(one, params=replace(one.params, temperature=0.0))
    for _ in range(3):
        assert len(await limited.ask(greedy)) == 2
    assert len(limited.engine.requests) == 1
    assert limited.tokens_left() == 600 - 5
    assert limited.values()["key:k:requests_per_minute"] == 7 * 60_000
    assert [row.output_tokens for row in limited.usage.rows] == [2, 0, 0]


async def test_what_is_computed_for_followers_is_paid_when_the_first_request_has_left() -> None:
    """Otherwise a caller could leave at once and let a second request read the answer for nothing."""
    gate, more = asyncio.Event(), asyncio.Event()
    script: list[Any] = [chunk("a"), gate, chunk("b"), more, LAST]
    engine = ScriptedEngine(lambda _: script, ModelInfo(CONTEXT, 300, frozenset()))
    limited = Limited(engine, Limits(tokens_per_minute=600), cache=True)
    one = ask()
    greedy = replace(one, params=replace(one.params, temperature=0.0))
    leader, follower = limited.stage.generate(greedy), limited.stage.generate(greedy)
    await anext(leader)
    await anext(follower)
    await leader.aclose()
    gate.set()
    more.set()
    assert len([part async for part in follower]) == 2
    assert [(row.prompt_tokens, row.output_tokens) for row in limited.usage.rows] == [(1, 1), (0, 2)]
    assert limited.tokens_left() == 600 - 4


async def test_64_concurrent_streams_never_overshoot() -> None:
    limit = 5000

    def script(one: GenerationRequest) -> list[Any]:
        return [*(step for _ in range(99) for step in (chunk(), 0.0)), LAST]

    engine = ScriptedEngine(script, ModelInfo(CONTEXT, 300, frozenset()))
    limited = Limited(engine, Limits(tokens_per_day=limit), Limits(tokens_per_minute=limit * 2))

    async def stream(number: int) -> None:
        for _ in range(3):
            chunks: AsyncGenerator[Chunk, None] = limited.stage.generate(ask(max_tokens=100))
            try:
                async with aclosing(chunks):
                    async for _ in chunks:
                        if number % 4 == 0 and len(limited.usage.rows) % 3 == 0:
                            break  # the client leaves
            except InsufficientQuota:
                await asyncio.sleep(0.01)

    await asyncio.gather(*map(stream, range(64)))
    used = sum(row.prompt_tokens + row.output_tokens for row in limited.usage.rows)
    assert limited.values()["key:k:tokens_per_day"] == used
    assert limit - 200 < used <= limit


async def test_reasoning_is_counted_apart() -> None:
    def event(*deltas: Any, end: FinishReason | None = None) -> Chunk:
        return Chunk((TokenEvent(1, "x", 0.1, end, deltas=deltas),), 5, 0.0, cached_tokens=4)

    script = [event(ReasoningDelta("x")), event(), event(TextDelta("y")), event(TextDelta("z"), end=FinishReason.STOP)]
    limited = Limited(ScriptedEngine(lambda _: script), price=Price(input_per_million=2, cached_input_per_million=1))
    await limited.ask(ask())
    assert limited.usage.rows == [Usage("t", "k", "m", 5, 4, 4, 2, 1 * 2000 + 4 * 1000)]
