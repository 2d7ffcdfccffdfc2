"""Reasoning: the detection of its marks, the division of answers, and grammars for what follows it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, strategies as st

from serve_app.core.events import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Grammar,
    SamplingParams,
    Tool,
    ToolChoice,
)
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.text.reasoning import ContentParser, ReasoningParser
from serve_app.engines.text.reasoning_format import ReasoningFormat
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest

from .chat_templates import CHANNEL_TOKENS, CHANNELS, OPENED, PARTS, QWEN, THINKING
from .constraints import token_ids
from .sample_tokenizers import EMBEDDED_END, EMBEDDED_VOCABULARY, embedded_tokenizer, extended_tokenizer

THINK = ReasoningFormat("<think>", "</think>")
ASK = ChatPrompt((ChatMessage("user", "Why?"),))
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"


@cache
def text_with(
    template: str, tokens: tuple[str, ...] = ("<think>", "</think>"), special: tuple[str, ...] = ()
) -> HFText:
    tokenizer = extended_tokenizer(template, list(tokens), list(special))
    end = tokenizer.convert_tokens_to_ids("<|return|>") if "<|return|>" in special else EMBEDDED_END
    return HFText(tokenizer, frozenset({end}), len(tokenizer))


def plan_of(text: HFText, prompt: ChatPrompt = ASK, params: SamplingParams | None = None) -> AnswerPlan:
    (ids,) = text.encode([prompt])
    assert isinstance(ids, list)
    request = GenerationRequest("id", "m", prompt, params or SamplingParams(), 0.0, 9.0, separate_reasoning=True)
    plan = text.plan(request, ids)
    assert isinstance(plan, AnswerPlan), plan
    return plan


def join(deltas: Iterable[Delta]) -> tuple[str, str]:
    """The reasoning and the content."""
    reasoning = content = ""
    for delta in deltas:
        assert not isinstance(delta, ToolCallDelta)
        assert delta.text, "no delta is empty"
        if isinstance(delta, ReasoningDelta):
            assert not content, "reasoning precedes content"
            reasoning += delta.text
        else:
            content += delta.text
    return reasoning, content


def divided(plan: AnswerPlan, answer: str) -> tuple[str, str]:
    assert plan.parser is not None
    return join([delta for piece in answer for delta in plan.parser.feed(piece)] + plan.parser.end())


@pytest.mark.model
@pytest.mark.parametrize(
    ("template", "tokens", "special", "expected"),
    [
        (THINKING, ("<think>", "</think>"), (), THINK),
        (OPENED, ("<think>", "</think>"), (), THINK),
        (OPENED.replace("think", "reasoning"), (), (), ReasoningFormat("<reasoning>", "</reasoning>")),
        (CHANNELS, (), CHANNEL_TOKENS, ReasoningFormat("<|channel|>analysis<|message|>", FINAL)),
        (QWEN, (), (), None),
        (PARTS, (), (), None),
    ],
    ids=["thinking", "opened", "reasoning", "channels", "qwen 2.5", "parts"],
)
def test_the_marks_are_detected(
    template: str, tokens: tuple[str, ...], special: tuple[str, ...], expected: ReasoningFormat | None
) -> None:
    assert text_with(template, tokens, special).chat.reasoning == expected


@pytest.mark.model
def test_a_model_without_reasoning_has_undivided_answers() -> None:
    assert plan_of(text_with(QWEN)).parser is None
    text = text_with(THINKING)
    request = GenerationRequest("id", "m", ASK, SamplingParams(), 0.0, 9.0)
    assert text.plan(request, [1]) == AnswerPlan(SamplingParams()), "only chats divide answers"


@pytest.mark.model
@pytest.mark.parametrize(
    ("template", "variables", "answer", "expected"),
    [
        (THINKING, {}, "<think>\nHm.\n\nSo.\n</think>\n\nYes.", ("Hm.\n\nSo.", "Yes.")),
        (THINKING, {}, "Yes.", ("", "Yes.")),
        (THINKING, {"enable_thinking": False}, "Yes.", ("", "Yes.")),
        (THINKING, {}, "<think>\nHm.", ("Hm.", "")),
        (THINKING, {}, "<think>\n\n</think>\n\n", ("", "")),
        (THINKING, {}, "<thin", ("", "<thin")),
        (OPENED, {}, "Hm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        (OPENED, {}, "Hm. </thi", ("Hm. </thi", "")),
    ],
)
def test_an_answer_is_divided(
    template: str, variables: dict[str, object], answer: str, expected: tuple[str, str]
) -> None:
    text = text_with(template)
    assert divided(plan_of(text, replace(ASK, variables=json.dumps(variables))), answer) == expected


@pytest.mark.model
def test_marks_of_special_tokens_are_hidden() -> None:
    text = text_with(CHANNELS, (), CHANNEL_TOKENS)
    plan = plan_of(text)
    assert not plan.params.skip_special_tokens
    assert divided(plan, f"<|channel|>analysis<|message|>Hm.{FINAL}Yes.") == ("Hm.", "Yes.")
    params = SamplingParams(include_stop_str_in_output=True)
    (ids,) = text.encode([ASK])
    assert isinstance(ids, list)
    refusal = text.plan(GenerationRequest("id", "m", ASK, params, 0.0, 9.0, separate_reasoning=True), ids)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "include_stop_str_in_output"


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think", " ", "\n", "a"]), max_size=12), st.booleans())
def test_the_pieces_of_an_answer_do_not_matter(pieces: list[str], inside: bool) -> None:
    parsers = [ReasoningParser(THINK, ContentParser(), inside) for _ in range(3)]
    whole = "".join(pieces)
    results = {
        join([delta for piece in parts for delta in parser.feed(piece)] + parser.end())
        for parser, parts in zip(parsers, (pieces, [whole], list(whole)), strict=True)
    }
    ((reasoning, content),) = results
    assert reasoning == reasoning.strip()
    if not inside and not whole.lstrip().startswith("<think>"):
        assert (reasoning, content) == ("", whole)


@pytest.mark.model
@pytest.mark.parametrize(
    ("template", "answer", "follows"),
    [
        (THINKING, '<think>\nAny text, {even this}.\n</think>{"a": 1}', True),
        (THINKING, '{"a": 1}', True),
        (THINKING, "Any text.", False),
        (THINKING, "<think>\nHm.\n</think>Any text.", False),
        (OPENED, 'Any text.\n</think>{"a": 1}', True),
        (OPENED, "Any text.\n</think>Any text.", False),
    ],
)
def test_a_grammar_applies_after_the_reasoning(template: str, answer: str, follows: bool) -> None:
    text = text_with(template)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    plan = plan_of(text, params=SamplingParams(grammar=Grammar("json_schema", json.dumps(schema))))
    assert plan.constraint is not None
    for token in token_ids(text, answer):
        bits = plan.constraint.allowed()
        assert isinstance(bits, bytes | bytearray)
        if not bits[token // 8] >> token % 8 & 1:
            assert not follows, f"{text.token_text(token)!r} is refused"
            return
        plan.constraint.accept(token)
    assert follows


@pytest.mark.model
def test_no_end_token_is_allowed_in_the_reasoning() -> None:
    text = text_with(OPENED)
    plan = plan_of(text, params=SamplingParams(grammar=Grammar("json_object")))
    assert plan.constraint is not None
    bits = plan.constraint.allowed()
    assert isinstance(bits, bytes)
    allowed = [token for token in range(text.vocabulary) if bits[token // 8] >> token % 8 & 1]
    assert set(range(text.vocabulary)) - set(allowed) == text.end_ids


@pytest.mark.model
def test_tool_calls_follow_the_reasoning() -> None:
    template = QWEN.replace("{%- for m in messages -%}", "{#- </think> -#}{%- for m in messages -%}")
    text = text_with(template)
    tool = Tool("f", '{"type": "object", "properties": {}}', "tools[0]")
    (ids,) = text.encode([ASK])
    assert isinstance(ids, list)
    choice = ToolChoice((tool,), required=True)
    request = GenerationRequest("id", "m", ASK, SamplingParams(), 0.0, 9.0, tool_choice=choice, separate_reasoning=True)
    plan = text.plan(request, ids)
    assert isinstance(plan, AnswerPlan)
    assert plan.parser is not None
    answer = '<think>\nI call.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    deltas = [*plan.parser.feed(answer), *plan.parser.end()]
    assert deltas[0] == ReasoningDelta("I call.")
    assert next(delta for delta in deltas if isinstance(delta, ToolCallDelta)).name == "f"
    assert not any(isinstance(delta, TextDelta) for delta in deltas)


@pytest.mark.model
def test_the_embedded_model_does_not_reason() -> None:
    text = HFText(embedded_tokenizer(), frozenset({EMBEDDED_END}), EMBEDDED_VOCABULARY)
    assert text.chat.reasoning is None
