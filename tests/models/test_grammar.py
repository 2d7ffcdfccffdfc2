"""Answers that follow a grammar: what may come next, what is refused, and the embedded model held to 200 schemas."""

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
from serve_app.engines.native.stream import TokenStream
from serve_app.engines.text.grammar import Constraint
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest
from tests.engines.native.helpers import request, streams, tokens_of
from tests.models import tiny
from tests.models.crowd import ask, idle, model_config, running
from tests.models.schemas import schema

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

END = 256
DIGITS = Grammar("regex", "[0-9]{1,3}")
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def text() -> HFText:
    """One token a byte; 256 ends an answer."""
    return HFText(tiny.tokenizer(), frozenset({END}), tiny.VOCABULARY)


def begun(text: HFText, grammar: Grammar, ignore_eos: bool = False) -> Constraint:
    constraint = text.constraint(grammar, ignore_eos)
    assert isinstance(constraint, Constraint), constraint
    return constraint


def spelt(text: HFText, *pieces: str) -> list[int]:
    """Token ids of these pieces, one after another."""
    return [token for piece in pieces for token in text._rust.encode(piece).ids]


def may_come(constraint: Constraint, text: HFText) -> set[str]:
    """All tokens that may come next, by name."""
    bits = constraint.allowed()
    assert isinstance(bits, bytearray)
    return {text.token_text(token) for token in range(tiny.VOCABULARY) if bits[token // 8] >> token % 8 & 1}


def follows(text: HFText, grammar: Grammar, answer: str) -> bool | None:
    """Whether the answer is complete: None if not even allowed."""
    constraint, complete = begun(text, grammar), False
    for token in spelt(text, answer):
        bits = constraint.allowed()
        assert isinstance(bits, bytearray)
        if complete or not bits[token // 8] >> token % 8 & 1:
            return None
        complete = constraint.accept(token)
    return complete or "<end>" in may_come(constraint, text)


# What may come next


def test_the_end_may_come_exactly_where_the_text_may_end(text: HFText) -> None:
    constraint = begun(text, DIGITS)
    assert may_come(constraint, text) == set("0123456789")
    assert not constraint.accept(*spelt(text, "4"))
    assert may_come(constraint, text) == {*"0123456789", "<end>"}
    assert not constraint.accept(*spelt(text, "2"))
    assert constraint.accept(*spelt(text, "0")), "nothing more can follow"
    assert may_come(constraint, text) == {"<end>"}
    assert constraint.accept(END)


def test_with_ignore_eos_the_end_may_come_only_where_nothing_else_can(text: HFText) -> None:
    constraint = begun(text, DIGITS, ignore_eos=True)
    for digit in "420":
        assert may_come(constraint, text) == set("0123456789")
        complete = constraint.accept(*spelt(text, digit))
    assert complete


def test_all_end_tokens_of_a_model_may_come_where_one_may() -> None:
    tilde = tiny.tokenizer().convert_tokens_to_ids("~")
    several = HFText(tiny.tokenizer(), frozenset({END, tilde}), tiny.VOCABULARY)
    constraint = begun(several, Grammar("regex", "[!-~]{1,2}"))
    assert not {"<end>", "~"} & may_come(constraint, several)
    constraint.accept(*spelt(several, "a"))
    assert {"<end>", "~"} <= may_come(constraint, several)
    assert constraint.accept(END)


@pytest.mark.parametrize(
    ("grammar", "complete", "unfinished", "wrong"),
    [
        (Grammar("json_object", ""), '{"a": [1, {"b": null}]}', '{"a": 1', "[1]"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 10, "maximum": 20}'), "17", "1", "21"),
        (Grammar("regex", "(ab)+c"), "ababc", "abab", "aba"),
        (Grammar("choice", '["yes", "no", "a \\"third\\" ü"]'), 'a "third" ü', "ye", "maybe"),
        (Grammar("lark", 'start: "a" b+\nb: "b" | "c"'), "abc", "a", "b"),
    ],
)
def test_every_kind_is_followed(text: HFText, grammar: Grammar, complete: str, unfinished: str, wrong: str) -> None:
    assert [follows(text, grammar, answer) for answer in (complete, unfinished)] == [True, False]
    assert not follows(text, grammar, wrong)


def test_a_choice_may_begin_another(text: HFText) -> None:
    assert [follows(text, Grammar("choice", '["a", "ab"]'), answer) for answer in ("a", "ab", "abb")] == [
        True,
        True,
        None,
    ]


@pytest.mark.parametrize(("space", "allowed"), [(" ", True), ("\n" + " " * 24, True), ("  ", None), ("\n\n", None)])
def test_between_the_parts_of_a_document_is_one_space_or_a_new_line(
    text: HFText, space: str, allowed: bool | None
) -> None:
    assert follows(text, Grammar("json_object", ""), f'{{{space}"a":{space}1{space}}}') is allowed


def test_two_answers_in_one_grammar_know_nothing_of_each_other(text: HFText) -> None:
    one, other = begun(text, DIGITS), begun(text, DIGITS)
    one.accept(*spelt(text, "1"))
    assert (may_come(one, text) - may_come(other, text)) == {"<end>"}


def test_what_one_answer_does_to_its_grammar_the_others_do_not_feel(text: HFText) -> None:
    """Whether there was an a thirty places ago takes two to the thirty states to know."""
    dear = Grammar("regex", "(?s:.*a.{30})")
    first, second = begun(text, dear, True), begun(text, dear, True)
    letters, draw = spelt(text, "a", "b"), random.Random(1)
    for _ in range(20_000):
        if isinstance(first.allowed(), InvalidRequest):
            break
        first.accept(draw.choice(letters))
    else:
        pytest.fail("it was followed to its end")
    assert isinstance(second.allowed(), bytearray)
    assert isinstance(begun(text, dear, True).allowed(), bytearray)


# What is refused


def chain(rule: str, start: str, count: int) -> str:
    """Each defined by the next; 3,000 of them overflow the stack of whoever compiles them."""
    rules = [rule.format(number, number + 1) for number in range(count - 1)]
    return "\n".join([start, *rules, rule.partition(":")[0].format(count - 1) + ': "x"'])


def references(count: int) -> str:
    ends = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(count)}
    document = {"$ref": "#/$defs/d0", "$defs": {**ends, f"d{count}": {"type": "string"}}}
    return json.dumps(document, separators=(",", ":"))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("json_schema", "{"), "(json_schema) cannot be read"),
        (Grammar("json_schema", "[]"), "a JSON schema is an object here"),
        (Grammar("json_schema", '{"type": "strange"}'), "(json_schema) does not compile"),
        (Grammar("json_schema", '{"type": "string", "format": "unheard-of"}'), "unheard-of"),
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "(json_schema) does not compile"),
        (Grammar("regex", "(a"), "(regex) does not compile"),
        (Grammar("regex", "(?=a)b"), "(regex) does not compile"),
        (Grammar("choice", "[]"), "a JSON list of strings"),
        (Grammar("choice", '"yes"'), "a JSON list of strings"),
        (Grammar("choice", "[1]"), "a JSON list of strings"),
        (Grammar("lark", "start: other"), "(lark) does not compile"),
        (Grammar("json_schema", "[" * 30_000), "(json_schema) cannot be read"),
        (Grammar("regex", "x" * 65_537), "has 65537 characters; at most 65536 are taken"),
        (Grammar("lark", chain("r{}: r{}", "start: r0", 5000)), "has 5001 rules or references; at most 500 are taken"),
        (Grammar("lark", chain("R{}: R{}", "start: R0", 5000)), "has 5001 rules or references; at most 500 are taken"),
        (Grammar("json_schema", references(1500)), "has 1501 rules or references; at most 500 are taken"),
        (Grammar("lark", f"start: %json {references(1500)}\n"), "has 1502 rules or references; at most 500 are taken"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else value.kind,
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(text: HFText, grammar: Grammar, words: str) -> None:
    for _ in range(2):
        refusal = text.constraint(grammar, False)
        assert isinstance(refusal, InvalidRequest)
        assert words in refusal.message
        assert refusal.param == "grammar"


def test_a_tokenizer_that_cannot_be_used_is_refused_in_a_sentence() -> None:
    words = tiny.tokenizer()
    narrow = HFText(words, frozenset({END}), 100)
    refusal = narrow.constraint(DIGITS, False)
    assert isinstance(refusal, InvalidRequest)
    assert "this model's tokenizer" in refusal.message


def test_the_tokenizer_is_ready_for_grammars_before_anybody_is_served(tmp_path: Path) -> None:
    loaded = load(model_config(tiny.save("llama", tmp_path)), lambda stage: None)
    assert "_trie" in vars(loaded.text._grammars)
    assert loaded.text._grammars._checked.cache_info().currsize == 1


# Sampling


def asking(text: HFText, params: SamplingParams, prompt: str = "x") -> Sequence:
    """A sequence at its beginning, with its constraint if it asks for one."""
    (stream,) = streams([request(prompt, params=params)])
    constraint = None if params.grammar is None else begun(text, params.grammar, params.ignore_eos)
    return Sequence(stream, spelt(text, prompt), text.end_ids, 1000, constraint)


def said(text: HFText, asked: Sequence, logits: torch.Tensor) -> tuple[str, FinishReason | None]:
    """The answer that rows `[N, V]` lead to."""
    for row in logits:
        (sampled,) = tokens_of(sample(row[None], [asked], text.token_text))
        reason = asked.accept(sampled, 0.0).finish_reason
        if reason is not None:
            break
    ids = [token for token in asked.tokens[asked.prompt_len :] if token != END]
    return text._rust.decode(ids), reason


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tiny.VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 5.0]),
    filters=st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_whatever_the_model_says_the_answer_is_in_the_grammar(
    text: HFText, seed: int, temperature: float, filters: dict[str, Any], dtype: torch.dtype
) -> None:
    grammar = Grammar("regex", "-?(0|[1-9][0-9]{0,4})(,[a-c]{2})?")
    params = SamplingParams(temperature=temperature, seed=seed, grammar=grammar, **filters)
    answer, reason = said(text, asking(text, params), noise(30, seed).to(dtype))
    assert reason is FinishReason.STOP
    assert follows(text, grammar, answer)


def test_neighbours_draw_as_if_they_were_alone(text: HFText) -> None:
    rows = noise(8)
    params = [SamplingParams(seed=i, top_p=0.9, grammar=DIGITS if i % 2 else None) for i in range(8)]
    alone = [tokens_of(sample(rows[i : i + 1], [asking(text, params[i])], str))[0] for i in range(8)]
    order = random.Random(1).sample(range(8), 8)
    together = tokens_of(sample(rows[order], [asking(text, params[i]) for i in order], str))
    assert together == [alone[i] for i in order]


def test_the_grammar_comes_before_min_tokens_penalties_and_ignore_eos(text: HFText) -> None:
    """It ends where it must; and where it may go on, the others are heard."""
    wish = replace(GREEDY, grammar=DIGITS, min_tokens=9, ignore_eos=True, repetition_penalty=2.0, presence_penalty=2.0)
    row = torch.full((9, tiny.VOCABULARY), -1.0)
    row[:, END] = 50.0
    answer, reason = said(text, asking(text, wish), row)
    assert (len(answer), reason) == (3, FinishReason.STOP)
    assert len(set(answer)) == 3
    answer, reason = said(text, asking(text, replace(GREEDY, grammar=DIGITS, min_tokens=2)), row)
    assert (len(answer), reason) == (2, FinishReason.STOP)
    answer, reason = said(text, asking(text, replace(GREEDY, grammar=DIGITS)), row)
    assert (len(answer), reason) == (1, FinishReason.STOP)


def test_a_stop_token_counts_from_min_tokens_on_but_for_what_the_grammar_wants(text: HFText) -> None:
    wish = replace(GREEDY, grammar=Grammar("regex", "a(b|c)b"), stop_token_ids=tuple(spelt(text, "b")), min_tokens=9)
    row = torch.zeros(5, tiny.VOCABULARY)
    row[:, spelt(text, "b")] = 50.0
    assert said(text, asking(text, wish), row) == ("acb", FinishReason.STOP)


def test_the_token_that_completes_an_answer_is_told(text: HFText) -> None:
    asked = asking(text, replace(GREEDY, grammar=Grammar("choice", '["ab"]')))
    told = [asked.accept(tokens_of(sample(noise(1), [asked], str))[0], 0.0) for _ in "ab"]
    assert [(token.finish_reason, token.complete) for token in told] == [(None, False), (FinishReason.STOP, True)]


def test_logprobs_are_the_models_own_whatever_the_grammar(text: HFText) -> None:
    rows = noise(1)
    (sampled,) = tokens_of(sample(rows, [asking(text, replace(GREEDY, grammar=DIGITS, logprobs=1))], str))
    assert sampled.logprobs is not None
    own = rows[0].log_softmax(-1)
    assert sampled.logprobs.top[0].token_id == int(rows.argmax())
    assert sampled.logprobs.chosen.logprob == pytest.approx(own[sampled.token_id].item())


@pytest.mark.parametrize("number", range(40))
def test_any_walk_through_a_schema_is_a_valid_document(text: HFText, number: int) -> None:
    """Bytes by the roll of a die: all escapes and characters that are allowed anywhere."""
    asked = schema(1000 + number)
    params = SamplingParams(seed=number, grammar=Grammar("json_schema", json.dumps(asked)))
    document, reason = said(text, asking(text, params), torch.zeros(5000, tiny.VOCABULARY))
    assert reason is FinishReason.STOP
    jsonschema.validate(json.loads(document), asked, jsonschema.Draft202012Validator)


# The embedded model


@pytest.fixture(scope="module")
def engine() -> Iterator[NativeEngine]:
    """Guesses are on."""
    config = model_config(
        "builtin:smollm2-135m", max_running=32, max_context=1024, max_step_tokens=96, max_waiting=256, threads=1
    )
    with running(config.model_copy(update={"dtype": "bfloat16"})) as engine:
        yield engine


async def record(engine: NativeEngine, number: int, temperature: float = 1.0, beginning: str = "") -> list[TokenEvent]:
    grammar = Grammar("json_schema", json.dumps(schema(number)))
    params = SamplingParams(max_tokens=700, temperature=temperature, seed=number, grammar=grammar)
    return await ask(engine, TextPrompt(f"{beginning}Record {number} as JSON:"), params)


def told(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.timeout(900)
async def test_200_answers_are_valid_under_their_200_schemas(engine: NativeEngine) -> None:
    answers = await asyncio.gather(*(record(engine, number) for number in range(200)))
    for number, events in enumerate(answers):
        assert events[-1].finish_reason is FinishReason.STOP, (number, told(events))
        jsonschema.validate(json.loads(told(events)), schema(number), jsonschema.Draft202012Validator)
    await idle(engine)


async def test_an_answer_in_a_grammar_is_the_same_alone_in_a_crowd_and_after_a_preemption() -> None:
    """In int8, where rows do not round by their number; prompts are cut into chunks."""
    numbers = range(300, 308)
    beginning = "A register of many things, and of the people who own them. " * 4
    config = model_config("builtin:smollm2-135m", max_running=16, max_context=512, max_step_tokens=32, threads=1)
    config = config.model_copy(update={"quantization": "int8"})

    async def say(engine: NativeEngine, number: int) -> str:
        if number >= 302:
            return told(await record(engine, number, number % 2, beginning))
        # An answer of this length on every processor: the grammar has no end before it.
        endless = SamplingParams(max_tokens=110, temperature=1.0, seed=number, grammar=Grammar("regex", "[a-z ]{999}"))
        return told(await ask(engine, TextPrompt(f"{beginning}Story {number}:"), endless))

    async def plain(engine: NativeEngine, number: int) -> None:
        await ask(engine, TextPrompt(f"A story of {number} lines:"), SamplingParams(max_tokens=20, seed=number))

    with running(config) as wide:
        alone = [await say(wide, number) for number in numbers]
        crowd = await asyncio.gather(*(say(wide, n) for n in numbers), *(plain(wide, n) for n in numbers))
        assert list(crowd[: len(numbers)]) == alone
    with running(config, kv_tokens=192) as narrow:  # six blocks, and an endless answer fills them alone
        assert await asyncio.gather(*(say(narrow, number) for number in numbers)) == alone
        assert narrow.stats().preemptions > 0


async def test_one_that_follows_a_grammar_is_not_guessed(engine: NativeEngine) -> None:
    before = engine.stats().drafted
    grammar = Grammar("regex", "(one two three ){20}")
    events = await ask(engine, TextPrompt("one two three " * 5), SamplingParams(max_tokens=200, grammar=grammar))
    assert told(events) == "one two three " * 20
    assert engine.stats().drafted == before


async def test_a_grammar_that_does_not_compile_is_refused_among_good_requests(engine: NativeEngine) -> None:
    wishes = [SamplingParams(max_tokens=1, grammar=g) for g in (DIGITS, Grammar("regex", "("), None)]
    made = [
        TokenStream(replace(request([5], params=params), arrived=time.monotonic(), deadline=time.monotonic() + 60))
        for params in wishes
    ]
    outcomes = await asyncio.to_thread(engine.admit, made)
    for stream in made:
        stream.close()
    assert [type(outcome) for outcome in outcomes] == [type(None), InvalidRequest, type(None)]


async def test_a_grammar_that_asks_for_too_much_ends_its_own_answer_only(engine: NativeEngine) -> None:
    """Every piece of its answer can be read in more ways than the last."""
    endless = Grammar("lark", "start: s\ns: s s s | s s | s | A | B\nA: /[a-z]/\nB: /[a-z]{2}/")
    plain = asyncio.create_task(ask(engine, TextPrompt("Once"), SamplingParams(max_tokens=50, ignore_eos=True)))
    with pytest.raises(InvalidRequest, match="the grammar cannot be followed: parser error: Too many items"):
        await ask(engine, TextPrompt("Once"), SamplingParams(seed=1, grammar=endless, ignore_eos=True))
    assert len(await plain) == 50
