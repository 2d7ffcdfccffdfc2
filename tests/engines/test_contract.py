"""What every engine does with a request, alike in the native engine, in vLLM and in the toy.

Tests of vLLM need an environment that has it: `make test-long` runs them there.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.queries import Detokenize, GetModelInfo, Tokenize
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    Grammar,
    GrammarKind,
    TextPrompt,
)
from serve_app.engines.protocol import EngineStats
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotReady,
    PromptTooLong,
    QueueFull,
    ServeAppError,
)
from serve_app.telemetry.libraries import families
from tests.engines.subjects import CONTEXT, LONG, MAX_RUNNING, MAX_WAITING, ONCE, Subject, make_engine
from tests.engines.text.call_formats import HERMES, join_deltas, parse
from tests.engines.text.tool_families import SHOWN_TOOLS, choice
from tests.models.concurrent_load import read, wait_until_idle

# As text: the environment with vLLM does not have the package that makes dashboards.
DASHBOARD = (Path(__file__).parents[2] / "alerts/dashboards/llm.py").read_text()
TOY, NATIVE = pytest.param("toy"), pytest.param("native", marks=pytest.mark.model)
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long])

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[TOY, NATIVE, VLLM])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    engine = make_engine(request.param)
    await asyncio.to_thread(engine.start)
    yield Subject(request.param, engine)
    await asyncio.to_thread(engine.stop)


# Tests of what the toy does not have: it chooses no token, and only repeats its prompt.
of_models = pytest.mark.parametrize("subject", [NATIVE, VLLM], indirect=True, scope="module")


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


async def test_a_greedy_answer_is_the_same_again(subject: Subject) -> None:
    first, second = await subject.events(), await subject.events()
    assert len(first) == 16
    assert [event.finish_reason for event in first] == [None] * 15 + [FinishReason.LENGTH]
    assert ids_of(first) == ids_of(second)
    assert text_of(first) == text_of(second)
    assert first[0].elapsed_s <= first[-1].elapsed_s


async def test_requests_together_have_one_answer_each(subject: Subject) -> None:
    prompts = [TextPrompt(f"{number} times {number} is") for number in range(MAX_RUNNING)]
    streams = [subject.stream(prompt, max_tokens=8 + i, ignore_eos=True) for i, prompt in enumerate(prompts)]
    together = await subject.all_events(*streams)
    assert [len(events) for events in together] == [8, 9, 10, 11]
    assert [events[-1].finish_reason for events in together] == [FinishReason.LENGTH] * MAX_RUNNING


@of_models
async def test_a_seed_decides_the_answer(subject: Subject) -> None:
    sample = partial(subject.events, temperature=1.0, max_tokens=12)
    assert ids_of(await sample(seed=5)) == ids_of(await sample(seed=5))
    assert ids_of(await sample(seed=5)) != ids_of(await sample(seed=6))


@of_models
async def test_answers_of_a_group_have_the_seeds_that_follow(subject: Subject) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "group": "g"}
    group = await subject.all_events(*(subject.stream(**fields, seed=5, index=i) for i in range(3)))
    assert len({tuple(ids_of(events)) for events in group}) == 3
    alone = await subject.events(temperature=1.0, max_tokens=12, seed=7)
    assert ids_of(group[2]) == ids_of(alone)


@of_models
async def test_filters_that_keep_one_token_make_sampling_greedy(subject: Subject) -> None:
    greedy = ids_of(await subject.events())
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids_of(await subject.events(temperature=1.0, **one)) == greedy, one


@of_models
async def test_a_bias_changes_the_token_and_not_the_reported_log_probabilities(subject: Subject) -> None:
    (plain,) = await subject.events(max_tokens=1, logprobs=2)
    assert plain.logprobs is not None
    (first, second) = plain.logprobs.top
    (biased,) = await subject.events(max_tokens=1, logprobs=2, logit_bias=((second.token_id, 50.0),))
    assert biased.token_id == second.token_id
    assert biased.logprobs is not None
    assert biased.logprobs.chosen.logprob == pytest.approx(second.logprob, abs=1e-3)
    assert [one.token_id for one in biased.logprobs.top] == [first.token_id, second.token_id]


@of_models
async def test_penalties_prevent_repetition(subject: Subject) -> None:
    prompt = TextPrompt("a b " * 10)
    plain = await subject.events(prompt, ignore_eos=True)
    assert len(set(ids_of(plain))) <= 4
    for penalty in ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, {"repetition_penalty": 2.0}):
        assert len(set(ids_of(await subject.events(prompt, ignore_eos=True, **penalty)))) >= 8, penalty


async def test_a_stop_string_ends_the_answer(subject: Subject) -> None:
    text = text_of(await subject.events())
    stop = text[5:8]
    before = text[: text.index(stop)]
    events = await subject.events(stop=(stop,))
    assert (text_of(events), events[-1].finish_reason, events[-1].stopped_by) == (before, FinishReason.STOP, stop)
    kept = await subject.events(stop=(stop,), include_stop_str_in_output=True)
    assert text_of(kept) == before + stop
    await wait_until_idle(subject.engine)


async def test_a_stop_token_ends_the_answer_after_min_tokens(subject: Subject) -> None:
    ids = ids_of(await subject.events())
    stop = ids[3]
    events = await subject.events(stop_token_ids=(stop,))
    assert ids_of(events) == ids[: ids.index(stop) + 1]
    assert (events[-1].finish_reason, events[-1].stopped_by) == (FinishReason.STOP, stop)
    assert events[-1].text == ""
    if subject.kind != "toy":  # whose tokens are not chosen
        assert len(await subject.events(stop_token_ids=(stop,), min_tokens=9)) >= 9


@of_models
async def test_the_end_token_of_the_model_ends_the_answer_unless_it_is_ignored(subject: Subject) -> None:
    prompt = ChatPrompt((ChatMessage("user", "What is the capital of France?"),))
    ended = await subject.events(prompt, max_tokens=100)
    assert (ended[-1].finish_reason, ended[-1].stopped_by) == (FinishReason.STOP, None)
    assert len(ended) < 100
    ignored = await subject.events(prompt, max_tokens=len(ended) + 5, ignore_eos=True)
    assert len(ignored) == len(ended) + 5
    assert ids_of(ignored)[: len(ended)] == ids_of(ended)


@of_models
async def test_log_probabilities_of_an_answer(subject: Subject) -> None:
    for event in await subject.events(logprobs=3):
        found = event.logprobs
        assert found is not None
        assert found.chosen.token_id == event.token_id == found.top[0].token_id
        values = [one.logprob for one in found.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] <= 0
    assert all(event.logprobs is None for event in await subject.events())
    assert all(event.logprobs and event.logprobs.top == () for event in await subject.events(logprobs=0))


async def test_log_probabilities_of_a_prompt(subject: Subject) -> None:
    stream = subject.stream(max_tokens=1, prompt_logprobs=2, prompt_details=True)
    assert await subject.admit(stream) == [None]
    chunks = [chunk async for chunk in stream.chunks(0.0)]
    stream.close()
    (details,) = [chunk.prompt for chunk in chunks if chunk.prompt is not None]
    tokens = [token.token_id for token in details.tokens]
    assert [one.chosen.token_id for one in details.logprobs] == tokens[1:]
    for one in details.logprobs:
        assert one.rank is not None
        assert one.rank >= 1
        assert (one.rank <= 2) == (one.chosen.token_id in [top.token_id for top in one.top]) or subject.kind == "toy"


GRAMMARS: list[tuple[GrammarKind, str, Callable[[str], object]]] = [
    ("json_object", "", lambda text: isinstance(json.loads(text), dict)),
    (
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
                "required": ["age"],
            }
        ),
        lambda text: list(json.loads(text)) == ["age"],
    ),
    ("regex", "[0-9]{3}-[a-f]{2}", lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text)),
    ("choice", '["red", "green", "blue::=x"]', lambda text: text in ("red", "green", "blue::=x")),
    ("lark", 'start: "(" start ")" | /[xyz]/', lambda text: re.fullmatch(r"\(*[xyz]\)*", text)),
]


@of_models
@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize(("kind", "text", "valid"), GRAMMARS, ids=[kind for kind, _, _ in GRAMMARS])
async def test_an_answer_follows_its_grammar_to_the_end(
    subject: Subject, kind: GrammarKind, text: str, valid: Callable[[str], object], ignore_eos: bool
) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "max_tokens": 300, "grammar": Grammar(kind, text)}
    streams = [subject.stream(seed=seed, ignore_eos=ignore_eos, **fields) for seed in range(MAX_RUNNING)]
    for events in await subject.all_events(*streams):
        if events[-1].finish_reason is FinishReason.STOP:
            assert valid(text_of(events)), text_of(events)
        else:
            assert kind in ("json_object", "lark"), "all other grammars end"


async def test_a_faulty_grammar_is_refused_before_it_reaches_the_model(subject: Subject) -> None:
    refusal = await subject.refusal(grammar=Grammar("regex", "(", "response_format"))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "response_format"


@of_models
async def test_a_required_tool_is_called_with_valid_arguments(subject: Subject) -> None:
    events = await subject.events(CALLS, tool_choice=choice("weather", required=True, parallel=False), max_tokens=200)
    content, calls = join_deltas(delta for event in events for delta in event.deltas or ())
    assert (content, calls) == parse(HERMES, text_of(events))
    assert [call.name for call in calls] == ["weather"]
    assert isinstance(json.loads(calls[0].arguments), dict)


async def test_a_closed_stream_ends_its_request(subject: Subject) -> None:
    streams = [subject.stream(max_tokens=400, ignore_eos=True) for _ in range(MAX_RUNNING + 1)]
    assert await subject.admit(*streams) == [None] * len(streams)
    await anext(streams[0].chunks(0.0))
    for stream in streams:
        stream.close()
    await wait_until_idle(subject.engine)
    assert len(await subject.events(max_tokens=2)) == 2


async def test_a_deadline_ends_a_request_with_its_error(subject: Subject) -> None:
    stream = subject.stream(max_tokens=480, ignore_eos=True, timeout_s=0.5)
    assert await subject.admit(stream) == [None]
    with pytest.raises(DeadlineExceeded, match="was not finished after"):
        await read(stream)
    assert isinstance(await subject.refusal(timeout_s=-1), DeadlineExceeded)
    await wait_until_idle(subject.engine)


async def test_more_requests_than_may_wait_are_refused(subject: Subject) -> None:
    streams = [subject.stream(max_tokens=400, ignore_eos=True) for _ in range(MAX_RUNNING + MAX_WAITING + 3)]
    refusals = [refusal for refusal in await subject.admit(*streams) if refusal is not None]
    async with asyncio.timeout(10):  # the native engine refuses a moment after admission
        while len(refusals) + sum(stream.ended for stream in streams) < 3:  # noqa: ASYNC110 - another thread's state
            await asyncio.sleep(0.005)
    refusals += [item for stream in streams if isinstance(item := stream.take(), ServeAppError)]
    assert [type(refusal) for refusal in refusals] == [QueueFull] * 3
    for stream in streams:
        stream.close()
    await wait_until_idle(subject.engine)


async def test_the_request_with_the_lowest_priority_number_goes_first(subject: Subject) -> None:
    running = [subject.stream(max_tokens=20 + 30 * number, ignore_eos=True) for number in range(MAX_RUNNING)]
    assert await subject.admit(*running) == [None] * MAX_RUNNING
    await anext(running[0].chunks(0.0))
    waiting = [subject.stream(max_tokens=2, ignore_eos=True, priority=number) for number in (3, 1, 2)]
    ended = asyncio.gather(*map(read, running))
    answers = await subject.all_events(*waiting)
    first = {
        stream.request.priority: stream.arrived + events[0].elapsed_s
        for stream, events in zip(waiting, answers, strict=True)
    }
    assert first[1] < first[2] < first[3]
    await ended


async def test_a_repeated_prompt_is_read_from_the_prefix_cache_of_its_salt(subject: Subject) -> None:
    async def cached(**fields: Any) -> int:
        stream = subject.stream(LONG, max_tokens=1, **fields)
        await subject.all_events(stream)
        return stream.cached_tokens

    assert await cached(cache_salt="a") == 0
    assert await cached(cache_salt="a") >= 128
    assert await cached(cache_salt="b") == 0
    assert await cached(cache_salt="a", prompt_logprobs=0) == 0


async def test_a_prompt_that_does_not_fit_is_refused(subject: Subject) -> None:
    refusal = await subject.refusal(TextPrompt("far too long " * CONTEXT))
    assert isinstance(refusal, PromptTooLong)
    stream = subject.stream(TextPrompt("far too long " * CONTEXT), truncate_prompt_tokens=20, max_tokens=1)
    await subject.all_events(stream)
    assert stream.prompt_tokens == 20


CALLS = ChatPrompt((ChatMessage("user", "What is the weather in Paris?"),), SHOWN_TOOLS)
PERSON = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}'
RESUMABLE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 7, "top_p": 0.95, "min_tokens": 8, "logprobs": 2},
    "second answer": {"temperature": 1.0, "seed": 7, "group": "g", "index": 1},
    "stop string": {"stop": ("nowhere", " of"), "max_tokens": 16},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.8, "presence_penalty": 0.2},
    "json": {"prompt": TextPrompt("A person: "), "grammar": Grammar("json_schema", PERSON), "max_tokens": 16},
    "tool call": {"prompt": CALLS, "tool_choice": choice("weather", required=True, parallel=False), "max_tokens": 20},
    "tool or text": {"prompt": CALLS, "tool_choice": choice("weather"), "max_tokens": 10},
}


@of_models
@pytest.mark.parametrize("name", RESUMABLE)
async def test_a_resumed_answer_goes_on_as_if_it_had_not_been_interrupted(subject: Subject, name: str) -> None:
    """After any of its tokens. The prefix cache has other keys and values than the lost replica had, or none."""
    fields = {"max_tokens": 9, **RESUMABLE[name]}
    whole = await subject.events(**fields)
    assert len(whole) > 4
    counts = (1, len(whole) // 2, len(whole) - 1)
    resumed = [
        subject.stream(**fields, resumed=tuple(ids_of(whole[:sent])), cache_salt=f"{name} {sent}") for sent in counts
    ]
    refusals = await subject.admit(*resumed)
    if subject.kind == "vllm" and name.startswith(("penalties", "json", "tool")):
        assert all(isinstance(refusal, NotReady) for refusal in refusals)
        return
    assert refusals == [None] * len(counts)
    for sent, rest in zip(counts, await asyncio.gather(*map(read, resumed)), strict=True):
        if subject.kind == "vllm" and "seed" in fields:
            assert len(rest) == len(whole) - sent
        else:
            assert [plain(event) for event in rest] == [plain(event) for event in whole[sent:]]


def plain(event: TokenEvent) -> TokenEvent:
    """Without what differs between two runs: times, and the last bits of log probabilities."""
    logprobs = event.logprobs
    if logprobs is not None:
        top = tuple(replace(one, logprob=round(one.logprob, 3)) for one in logprobs.top)
        logprobs = replace(
            logprobs, chosen=replace(logprobs.chosen, logprob=round(logprobs.chosen.logprob, 3)), top=top
        )
    return replace(event, elapsed_s=0.0, logprobs=logprobs)


async def test_the_toy_resumes_too_and_an_answer_that_had_ended_is_refused(subject: Subject) -> None:
    whole = await subject.events(max_tokens=6)
    rest = await subject.events(max_tokens=6, resumed=tuple(ids_of(whole[:4])))
    assert ids_of(rest) == ids_of(whole[4:])
    assert rest[-1].finish_reason is FinishReason.LENGTH
    over = subject.stream(max_tokens=6, resumed=tuple(ids_of(whole)))
    (refusal,) = await subject.admit(over)
    if refusal is None:
        with pytest.raises(InternalError, match="cannot be resumed"):
            await read(over)
    else:
        assert "cannot be resumed" in refusal.message


async def test_queries_are_answered(subject: Subject) -> None:
    tokens = subject.engine.answer(Tokenize(ONCE))
    assert not isinstance(tokens, ServeAppError)
    assert subject.engine.answer(Detokenize(tuple(token.token_id for token in tokens))) == ONCE.text
    info = subject.engine.answer(GetModelInfo())
    assert not isinstance(info, ServeAppError)
    assert info.context == CONTEXT


async def settled_stats(subject: Subject) -> EngineStats:
    """The counters once they stand still: an engine counts a step a moment after it has sent the tokens."""
    async with asyncio.timeout(5):
        last = None
        while last != (last := subject.engine.stats()):  # noqa: ASYNC110 - nothing reports this
            await asyncio.sleep(0.05)
    return last


async def test_the_counters_count_what_was_computed(subject: Subject) -> None:
    before = await settled_stats(subject)
    await subject.events(max_tokens=7)
    await wait_until_idle(subject.engine)
    after = await settled_stats(subject)
    assert after.generated_tokens - before.generated_tokens == 7
    assert (after.running, after.waiting) == (0, 0)
    assert after.slots == MAX_RUNNING
    assert after.kv_tokens >= CONTEXT
    assert subject.engine.step_age() == 0


@pytest.mark.parametrize("subject", [VLLM], indirect=True, scope="module")
async def test_vllm_has_the_metrics_of_the_dashboard(subject: Subject) -> None:
    await subject.events()
    shown = set(re.findall(r"vllm:\w+", DASHBOARD))
    assert shown
    assert shown - {family.name for family in families("m", "r")} == set()
