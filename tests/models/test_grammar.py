"""Tests of sampling with grammars, and of the embedded model's answers under grammars and 200 JSON schemas."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings, strategies as st

from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import Grammar, SamplingParams, TextPrompt
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.loader import load
from serve_app.engines.native.sampler import sample
from serve_app.engines.native.sequence import Sequence
from serve_app.engines.stream import TokenStream
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest
from tests.engines.native.helpers import describe, request, streams, tokens_of
from tests.engines.text.constraints import acceptance, new_constraint, token_ids
from tests.engines.text.json_schemas import random_schema
from tests.engines.text.sample_tokenizers import BYTE_VOCABULARY, END, byte_text
from tests.models import tiny
from tests.models.concurrent_load import generate, model_config, running, wait_until_idle

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

DIGITS = Grammar("regex", "[0-9]{1,3}")
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def text() -> HFText:
    """One token for each byte; 256 ends an answer."""
    return byte_text()


# Sampling


def new_sequence(text: HFText, params: SamplingParams, prompt: str = "x") -> Sequence:
    """A sequence before its first token, with the constraint of its grammar."""
    (stream,) = streams([request(prompt, params=params)])
    constraint = None if params.grammar is None else new_constraint(text, params.grammar, params.ignore_eos)
    return Sequence(stream, token_ids(text, prompt), text.end_ids, 1000, constraint)


def sample_answer(text: HFText, params: SamplingParams, logits: torch.Tensor) -> tuple[str, FinishReason | None]:
    """The answer sampled from logits `[N, V]`, one row for each token, and its finish reason."""
    sequence = new_sequence(text, params)
    for row in logits:
        (sampled,) = tokens_of(sample(row[None], [sequence], text.token_logprob))
        reason = sequence.accept(sampled, 0.0).finish_reason
        if reason is not None:
            break
    ids = [token for token in sequence.tokens[sequence.prompt_len :] if token != END]
    answer = text.detokenize(ids, skip_special_tokens=False)
    assert isinstance(answer, str), answer
    return answer, reason


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, BYTE_VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 5.0]),
    filters=st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_answer_follows_its_grammar_for_all_logits(
    text: HFText, seed: int, temperature: float, filters: dict[str, Any], dtype: torch.dtype
) -> None:
    grammar = Grammar("regex", "-?(0|[1-9][0-9]{0,4})(,[a-c]{2})?")
    params = SamplingParams(temperature=temperature, seed=seed, grammar=grammar, **filters)
    answer, reason = sample_answer(text, params, random_logits(30, seed).to(dtype))
    assert reason is FinishReason.STOP
    assert acceptance(text, grammar, answer)


def test_sequences_of_a_batch_sample_the_same_tokens_as_alone(text: HFText) -> None:
    rows = random_logits(8)
    params = [SamplingParams(seed=i, top_p=0.9, grammar=DIGITS if i % 2 else None) for i in range(8)]
    alone = [tokens_of(sample(rows[i : i + 1], [new_sequence(text, params[i])], describe))[0] for i in range(8)]
    order = random.Random(1).sample(range(8), 8)
    together = tokens_of(sample(rows[order], [new_sequence(text, params[i]) for i in order], describe))
    assert together == [alone[i] for i in order]


def test_grammar_takes_precedence_over_min_tokens_penalties_and_ignore_eos(text: HFText) -> None:
    """The answer ends where the grammar requires its end; elsewhere the other parameters apply."""
    logits = torch.full((9, BYTE_VOCABULARY), -1.0)
    logits[:, END] = 50.0
    params = replace(
        GREEDY, grammar=DIGITS, min_tokens=9, ignore_eos=True, repetition_penalty=2.0, presence_penalty=2.0
    )
    answer, reason = sample_answer(text, params, logits)
    assert (len(answer), reason) == (3, FinishReason.STOP)
    assert len(set(answer)) == 3
    answer, reason = sample_answer(text, replace(GREEDY, grammar=DIGITS, min_tokens=2), logits)
    assert (len(answer), reason) == (2, FinishReason.STOP)
    answer, reason = sample_answer(text, replace(GREEDY, grammar=DIGITS), logits)
    assert (len(answer), reason) == (1, FinishReason.STOP)


def test_stop_token_before_min_tokens_is_allowed_only_if_the_grammar_requires_it(text: HFText) -> None:
    stop = tuple(token_ids(text, "b"))
    params = replace(GREEDY, grammar=Grammar("regex", "a(b|c)b"), stop_token_ids=stop, min_tokens=9)
    logits = torch.zeros(5, BYTE_VOCABULARY)
    logits[:, stop] = 50.0
    assert sample_answer(text, params, logits) == ("acb", FinishReason.STOP)


def test_token_that_completes_the_grammar_is_marked_complete(text: HFText) -> None:
    sequence = new_sequence(text, replace(GREEDY, grammar=Grammar("choice", '["ab"]')))
    tokens = [sequence.accept(tokens_of(sample(random_logits(1), [sequence], describe))[0], 0.0) for _ in "ab"]
    assert [(token.finish_reason, token.complete) for token in tokens] == [(None, False), (FinishReason.STOP, True)]


def test_logprobs_are_computed_without_the_grammar(text: HFText) -> None:
    logits = random_logits(1)
    sequence = new_sequence(text, replace(GREEDY, grammar=DIGITS, logprobs=1))
    (sampled,) = tokens_of(sample(logits, [sequence], describe))
    assert sampled.logprobs is not None
    expected = logits[0].log_softmax(-1)
    assert sampled.logprobs.top[0].token_id == int(logits.argmax())
    assert sampled.logprobs.chosen.logprob == pytest.approx(expected[sampled.token_id].item())


# The embedded model


def test_loader_compiles_a_grammar_before_the_model_serves_requests(tmp_path: Path) -> None:
    loaded = load(model_config(tiny.save("llama", tmp_path)), lambda stage: None)
    assert "_trie" in vars(loaded.text._grammars)
    assert loaded.text._grammars._compiled.cache_info().currsize == 1


@pytest.fixture(scope="module")
def engine() -> Iterator[NativeEngine]:
    """With speculative decoding."""
    config = model_config(
        "builtin:smollm2-135m", max_running=32, max_context=1024, max_step_tokens=96, max_waiting=256, threads=1
    )
    with running(config.model_copy(update={"dtype": "bfloat16"})) as engine:
        yield engine


async def generate_record(
    engine: NativeEngine, number: int, temperature: float = 1.0, prefix: str = ""
) -> list[TokenEvent]:
    """The answer to a prompt, with the schema of this number."""
    grammar = Grammar("json_schema", json.dumps(random_schema(number)))
    params = SamplingParams(max_tokens=700, temperature=temperature, seed=number, grammar=grammar)
    return await generate(engine, TextPrompt(f"{prefix}Record {number} as JSON:"), params)


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [32, pytest.param(200, marks=pytest.mark.long)])
async def test_answers_are_valid_under_their_schemas(engine: NativeEngine, count: int) -> None:
    answers = await asyncio.gather(*(generate_record(engine, number) for number in range(count)))
    for number, events in enumerate(answers):
        assert events[-1].finish_reason is FinishReason.STOP, (number, text_of(events))
        jsonschema.validate(json.loads(text_of(events)), random_schema(number), jsonschema.Draft202012Validator)
    await wait_until_idle(engine)


async def test_answer_with_a_grammar_is_the_same_alone_concurrently_and_after_a_preemption() -> None:
    """In int8, whose results do not depend on the number of rows; prompts are divided into chunks."""
    numbers = range(300, 306)
    prefix = "A register of many things, and of the people who own them. " * 4
    config = model_config("builtin:smollm2-135m", max_running=16, max_context=512, max_step_tokens=32, threads=1)
    config = config.model_copy(update={"quantization": "int8"})

    async def constrained(engine: NativeEngine, number: int) -> str:
        if number >= 302:
            return text_of(await generate_record(engine, number, number % 2, prefix))
        # The grammar allows no end before max_tokens, so the answer has the same length on every processor.
        endless = SamplingParams(max_tokens=110, temperature=1.0, seed=number, grammar=Grammar("regex", "[a-z ]{999}"))
        return text_of(await generate(engine, TextPrompt(f"{prefix}Story {number}:"), endless))

    async def unconstrained(engine: NativeEngine, number: int) -> None:
        await generate(engine, TextPrompt(f"A story of {number} lines:"), SamplingParams(max_tokens=20, seed=number))

    with running(config) as wide:
        alone = [await constrained(wide, number) for number in numbers]
        concurrent = await asyncio.gather(
            *(constrained(wide, number) for number in numbers), *(unconstrained(wide, number) for number in numbers)
        )
        assert list(concurrent[: len(numbers)]) == alone
    with running(config, kv_tokens=192) as narrow:  # six blocks, which one endless answer fills
        assert await asyncio.gather(*(constrained(narrow, number) for number in numbers)) == alone
        assert narrow.stats().preemptions > 0


async def test_answer_with_a_grammar_is_not_drafted(engine: NativeEngine) -> None:
    before = engine.stats().drafted
    grammar = Grammar("regex", "(one two three ){20}")
    events = await generate(engine, TextPrompt("one two three " * 5), SamplingParams(max_tokens=200, grammar=grammar))
    assert text_of(events) == "one two three " * 20
    assert engine.stats().drafted == before


async def test_grammar_that_does_not_compile_is_refused_alone(engine: NativeEngine) -> None:
    now = time.monotonic()
    streams = [
        TokenStream(
            replace(request([5], params=SamplingParams(max_tokens=1, grammar=g)), arrived=now, deadline=now + 60)
        )
        for g in (DIGITS, Grammar("regex", "("), None)
    ]
    outcomes = await asyncio.to_thread(engine.admit, streams)
    for stream in streams:
        stream.close()
    assert [type(outcome) for outcome in outcomes] == [type(None), InvalidRequest, type(None)]


async def test_grammar_that_exceeds_the_limits_ends_only_its_own_answer(engine: NativeEngine) -> None:
    """With each token, the number of derivations of the answer grows."""
    ambiguous = Grammar("lark", "start: s\ns: s s s | s s | s | A | B\nA: /[a-z]/\nB: /[a-z]{2}/")
    plain = asyncio.create_task(generate(engine, TextPrompt("Once"), SamplingParams(max_tokens=50, ignore_eos=True)))
    with pytest.raises(InvalidRequest, match="the grammar cannot be followed: parser error: Too many items"):
        await generate(engine, TextPrompt("Once"), SamplingParams(seed=1, grammar=ambiguous, ignore_eos=True))
    assert len(await plain) == 50
