"""Tests of the preparation of an answer that may call tools."""

from __future__ import annotations

import pytest

from serve_app.core.requests import GenerationRequest, Grammar, SamplingParams, TextPrompt, Tool, ToolChoice
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.text.tokenizer import HFText
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_use import ToolUse, prepare_tool_use
from serve_app.errors import InvalidRequest, ServeAppError

from .call_formats import HERMES, LLAMA, MISTRAL, Call, join_deltas, write_calls
from .constraints import acceptance
from .sample_tokenizers import byte_text
from .tool_families import choice, family_text

PARAMS = SamplingParams(temperature=0.5, max_tokens=7)


def planned(text: HFText, choice: ToolChoice, params: SamplingParams) -> AnswerPlan | ServeAppError:
    request = GenerationRequest("id", "m", TextPrompt("a"), params, 0.0, 9.0, tool_choice=choice)
    return text.plan(request, [65])


def prepared(call_format: ToolCallFormat, params: SamplingParams = PARAMS) -> ToolUse:
    found = prepare_tool_use(call_format, choice(), params)
    assert isinstance(found, ToolUse), found
    return found


@pytest.mark.parametrize(
    ("call_format", "skip_special_tokens"),
    [(HERMES, True), (LLAMA, True), (MISTRAL, False)],
    ids=["hermes", "llama", "mistral"],
)
def test_special_tokens_are_kept_only_if_the_format_consists_of_them(
    call_format: ToolCallFormat, skip_special_tokens: bool
) -> None:
    assert prepared(call_format).params.skip_special_tokens is skip_special_tokens


def test_special_tokens_that_the_request_keeps_are_kept() -> None:
    assert not prepared(HERMES, SamplingParams(skip_special_tokens=False)).params.skip_special_tokens


def test_other_parameters_are_those_of_the_request() -> None:
    found = prepared(HERMES)
    assert (found.params.temperature, found.params.max_tokens) == (0.5, 7)
    assert found.params.grammar == found.grammar


def test_parser_reads_calls_in_the_models_format() -> None:
    parser = prepared(MISTRAL).parser
    deltas = parser.feed(write_calls(MISTRAL, ("weather", '{"city": "Rome"}')))
    assert join_deltas([*deltas, *parser.end()]) == ("", [Call("weather", '{"city": "Rome"}')])


def test_each_answer_has_a_parser_of_its_own() -> None:
    assert prepared(HERMES).parser is not prepared(HERMES).parser


def test_model_that_does_not_call_tools_refuses_them_and_names_a_template() -> None:
    refusal = prepare_tool_use(None, choice(), PARAMS)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "tools"
    assert "chat_template: builtin:chatml_tools" in str(refusal)


@pytest.mark.parametrize(("call_format", "refused"), [(HERMES, False), (MISTRAL, True)], ids=["hermes", "mistral"])
def test_text_that_ends_an_answer_is_refused_if_special_tokens_would_hide_it(
    call_format: ToolCallFormat, refused: bool
) -> None:
    params = SamplingParams(include_stop_str_in_output=True)
    result = prepare_tool_use(call_format, choice(), params)
    assert isinstance(result, InvalidRequest) is refused
    if isinstance(result, InvalidRequest):
        assert result.param == "include_stop_str_in_output"
    kept = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    assert isinstance(prepare_tool_use(call_format, choice(), kept), ToolUse)


def test_schema_that_is_not_json_is_refused_by_its_field() -> None:
    refusal = prepare_tool_use(HERMES, ToolChoice((Tool("f", "{", "tools[0].function.parameters"),)), PARAMS)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "tools[0].function.parameters"


@pytest.mark.model
def test_tokenizer_prepares_tool_use_in_its_detected_format() -> None:
    text = family_text("mistral")
    found = planned(text, choice(required=True), PARAMS)
    assert isinstance(found, AnswerPlan)
    assert found.parser is not None
    assert found.params.grammar is not None
    answer = write_calls(MISTRAL, ("weather", '{"city": "Rome"}'))
    assert acceptance(text, found.params.grammar, answer)
    assert not found.params.skip_special_tokens
    assert join_deltas(found.parser.feed(answer)) == ("", [Call("weather", '{"city": "Rome"}')])


@pytest.mark.model
def test_tokenizer_without_tool_support_refuses_tool_use() -> None:
    text = byte_text()
    assert text.chat.tools is None
    refusal = planned(text, choice(), SamplingParams(grammar=Grammar("json_object")))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "tools"
