"""Every field of every body has a test that shows what it does, and what is no field is refused.

A new field fails here until `TELLING` or `SHOWN` expected which test that is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import httpx
import pytest
from pydantic import ValidationError

import serve_app.api.app  # noqa: F401, with it come the bodies of every route
from serve_app.api import openapi
from serve_app.api.native.schema import SamplingFields
from serve_app.api.schema import Body
from serve_app.core.queries import GetModelInfo
from serve_app.core.requests import GenerationRequest, Grammar

from .scripted import POSTS, ScriptedEngine
from .syntaxes import HERMES
from .test_fields import SCHEMA, asked
from .test_tools import CHAT as TOOLS_CHAT, PATH as CHAT, WEATHER, info
from .toy import toy

TESTS = Path(__file__).parents[1]


class Telling(NamedTuple):
    """A value of a field, what of a request it decides, and what that is then."""

    value: Any
    decides: str
    becomes: Any


# The sampling fields that the native and OpenAI's bodies share.
TELLING = {
    "temperature": Telling(0.7, "temperature", 0.7),
    "top_p": Telling(0.5, "top_p", 0.5),
    "top_k": Telling(4, "top_k", 4),
    "min_p": Telling(0.1, "min_p", 0.1),
    "repetition_penalty": Telling(1.5, "repetition_penalty", 1.5),
    "presence_penalty": Telling(-2, "presence_penalty", -2),
    "frequency_penalty": Telling(2, "frequency_penalty", 2),
    "seed": Telling(7, "seed", 7),
    "stop": Telling(["x"], "stop", ("x",)),
    "stop_token_ids": Telling([7], "stop_token_ids", (7,)),
    "ignore_eos": Telling(True, "ignore_eos", True),
    "min_tokens": Telling(2, "min_tokens", 2),
    "logit_bias": Telling({"7": 1}, "logit_bias", ((7, 1),)),
    "skip_special_tokens": Telling(False, "skip_special_tokens", False),
    "include_stop_str_in_output": Telling(True, "include_stop_str_in_output", True),
    "guided_json": Telling(SCHEMA, "grammar", Grammar("json_schema", json.dumps(SCHEMA), "guided_json")),
    "guided_regex": Telling("a+", "grammar", Grammar("regex", "a+", "guided_regex")),
    "guided_choice": Telling(["a"], "grammar", Grammar("choice", '["a"]', "guided_choice")),
    "guided_grammar": Telling('start: "a"', "grammar", Grammar("lark", 'start: "a"', "guided_grammar")),
    "truncate_prompt_tokens": Telling(5, "truncate_prompt_tokens", 5),
    "priority": Telling(-3, "priority", -3),
    "cache_salt": Telling("mine", "cache_salt", "mine"),
}

# The class that declares them, its fields, and the test that shows what they do. The first ones show what the engine
# makes of what TELLING sees arrive; that an answer follows any grammar is shown in tests/models/test_grammar.py.
SHOWN = [
    ("SamplingFields", "temperature", "engine/test_sampler.py::test_draws_follow_the_softmax"),
    (
        "SamplingFields",
        "top_p top_k min_p",
        "engine/test_sampler.py::test_filters_that_want_more_than_the_candidates_are_still_exact",
    ),
    (
        "SamplingFields",
        "repetition_penalty presence_penalty frequency_penalty",
        "engine/test_sampler.py::test_penalties_are_those_of_a_naive_reference",
    ),
    (
        "SamplingFields",
        "seed",
        "engine/test_sampler.py::test_a_seed_gives_the_same_answer_again_and_another_seed_another",
    ),
    (
        "SamplingFields",
        "stop",
        "engine/test_stream.py::test_a_stop_string_ends_it_across_tokens_and_sends_the_engine_away",
    ),
    (
        "SamplingFields",
        "stop_token_ids",
        "engine/test_sequence.py::test_stop_token_ids_end_it_even_with_ignore_eos",
    ),
    ("SamplingFields", "ignore_eos", "engine/test_sequence.py::test_ignore_eos_goes_on_past_the_end_token"),
    ("SamplingFields", "min_tokens", "engine/test_sequence.py::test_no_token_ends_it_before_min_tokens"),
    ("SamplingFields", "logit_bias", "engine/test_sampler.py::test_biases_are_added_first_whatever_the_temperature"),
    (
        "SamplingFields",
        "skip_special_tokens include_stop_str_in_output",
        "engine/test_engine.py::test_special_tokens_and_what_ended_the_answer_are_shown_when_asked_for",
    ),
    (
        "SamplingFields",
        "guided_json guided_regex guided_choice guided_grammar",
        "api/test_fields.py::test_a_guided_field_reaches_the_engine_as_a_grammar",
    ),
    (
        "SamplingFields",
        "truncate_prompt_tokens",
        "engine/test_engine.py::test_of_a_prompt_the_last_tokens_can_be_kept",
    ),
    (
        "SamplingFields",
        "priority",
        "engine/test_scheduler.py::test_the_lowest_priority_is_served_first_and_of_equals_who_came_first",
    ),
    ("SamplingFields", "cache_salt", "api/test_every_field.py::test_a_salt_keeps_what_is_computed_apart"),
    ("NativeFields", "model max_tokens", "api/test_native.py::test_every_field_reaches_the_engine"),
    ("NativeFields", "do_sample", "api/test_native.py::test_do_sample_false_is_greedy"),
    ("NativeFields", "logprobs", "api/test_native.py::test_logprobs_of_an_answer"),
    ("GenerateBody", "prompt", "api/test_native.py::test_generate_answers_text_usage_and_metrics"),
    ("StreamBody", "include_text", "api/test_stream.py::test_a_stream_without_text_and_with_logprobs"),
    ("BatchBody", "prompts", "api/test_batch.py::test_prompts_have_the_common_fields"),
    ("BatchBody", "requests", "api/test_batch.py::test_requests_have_fields_of_their_own"),
    ("OpenAIFields", "model", "api/test_openai.py::test_every_field_reaches_the_engine"),
    ("OpenAIFields", "n", "api/test_fields.py::test_several_answers_are_forks_of_one_request"),
    ("OpenAIFields", "response_format", "api/test_fields.py::test_a_response_format_reaches_the_engine_as_a_grammar"),
    (
        "OpenAIFields",
        "stream stream_options",
        "api/test_fields.py::test_several_answers_are_streamed_with_one_end",
    ),
    ("OpenAIFields", "user", "api/test_prompt.py::test_the_user_of_a_call_is_logged"),
    ("OpenAIFields", "prompt_logprobs", "api/test_prompt.py::test_prompt_logprobs_have_ids_and_ranks"),
    ("OpenAIFields", "return_token_ids", "api/test_prompt.py::test_token_ids_of_prompt_and_answer"),
    ("StreamOptions", "include_usage", "api/test_openai.py::test_include_usage_adds_a_chunk_with_the_usage"),
    (
        "ResponseFormat",
        "type json_schema",
        "api/test_fields.py::test_a_response_format_reaches_the_engine_as_a_grammar",
    ),
    ("JsonSchema", "schema", "api/test_fields.py::test_a_response_format_reaches_the_engine_as_a_grammar"),
    (
        "JsonSchema",
        "name description strict",
        "api/test_every_field.py::test_what_is_said_about_a_schema_changes_no_answer",
    ),
    ("CompletionBody", "prompt", "api/test_fields.py::test_a_list_of_prompts_has_answers_in_order"),
    ("CompletionBody", "max_tokens", "api/test_openai.py::test_every_field_reaches_the_engine"),
    ("CompletionBody", "logprobs", "api/test_openai.py::test_logprobs_of_a_completion"),
    ("CompletionBody", "best_of", "api/test_best_of.py::test_the_most_likely_answers_are_returned_and_all_are_counted"),
    ("CompletionBody", "echo", "api/test_prompt.py::test_an_echo_precedes_the_answer"),
    ("ChatBody", "messages", "api/test_openai.py::test_content_can_be_a_list_of_parts"),
    (
        "ChatBody",
        "max_tokens max_completion_tokens",
        "api/test_openai.py::test_max_tokens_of_a_chat_has_two_names",
    ),
    ("ChatBody", "logprobs top_logprobs", "api/test_openai.py::test_logprobs_of_a_chat"),
    ("Message", "role content", "api/test_openai.py::test_content_can_be_a_list_of_parts"),
    (
        "Message",
        "name tool_call_id tool_calls",
        "api/test_tools.py::test_a_conversation_goes_on_with_what_the_tool_said",
    ),
    ("TextPart", "type text", "api/test_openai.py::test_content_can_be_a_list_of_parts"),
    ("EarlierCall", "id type function", "api/test_tools.py::test_a_conversation_goes_on_with_what_the_tool_said"),
    ("CalledFunction", "name arguments", "api/test_tools.py::test_a_conversation_goes_on_with_what_the_tool_said"),
    ("ToolFields", "tools", "api/test_tools.py::test_tools_reach_the_template_as_openai_writes_them"),
    ("ToolFields", "tool_choice parallel_tool_calls", "api/test_tools.py::test_the_choice_is_a_grammar"),
    ("OfferedTool", "type function", "api/test_tools.py::test_tools_reach_the_template_as_openai_writes_them"),
    (
        "Function",
        "name description parameters",
        "api/test_tools.py::test_tools_reach_the_template_as_openai_writes_them",
    ),
    ("Function", "strict", "api/test_every_field.py::test_calls_are_as_strict_as_can_be_whatever_is_said"),
    ("ChosenTool", "type function", "api/test_tools.py::test_the_choice_is_a_grammar"),
    ("ChosenFunction", "name", "api/test_tools.py::test_the_choice_is_a_grammar"),
    ("TokenizeBody", "model prompt return_token_strs", "api/test_tokens.py::test_tokens_of_a_prompt"),
    ("TokenizeBody", "messages add_special_tokens", "api/test_tokens.py::test_queries_of_tokenize"),
    ("TokenizeInputsBody", "model inputs", "api/test_tokens.py::test_tgi_form_has_the_place_of_each_token"),
    ("DetokenizeBody", "model tokens", "api/test_tokens.py::test_detokenize_returns_text"),
    (
        "EmbeddingsBody",
        "model",
        "api/test_embeddings.py::test_a_model_without_embeddings_is_refused_with_the_remedy",
    ),
    (
        "EmbeddingsBody",
        "input truncate_prompt_tokens priority",
        "api/test_embeddings.py::test_each_input_has_a_vector_in_order",
    ),
    ("EmbeddingsBody", "encoding_format", "api/test_embeddings.py::test_base64_holds_float32_values"),
    ("EmbeddingsBody", "dimensions", "api/test_embeddings.py::test_an_error_names_the_invalid_field"),
    ("EmbeddingsBody", "user", "api/test_embeddings.py::test_the_user_of_embeddings_is_logged"),
    ("TgiBody", "model", "api/test_tgi.py::test_the_body_or_the_query_names_the_model"),
    ("TgiBody", "inputs parameters", "api/test_tgi.py::test_the_native_engine_reports_a_truncated_prompt"),
    ("TgiBody", "stream", "api/test_tgi.py::test_a_stream_has_an_event_for_each_token"),
    (
        "Parameters",
        "max_new_tokens temperature top_k top_p repetition_penalty frequency_penalty seed stop truncate",
        "api/test_tgi.py::test_every_parameter_reaches_the_engine",
    ),
    ("Parameters", "do_sample", "api/test_tgi.py::test_which_parameters_sample"),
    ("Parameters", "return_full_text", "api/test_tgi.py::test_return_full_text_begins_with_the_prompt"),
    ("Parameters", "details", "api/test_tgi.py::test_details_list_every_token"),
    (
        "Parameters",
        "decoder_input_details",
        "api/test_tgi.py::test_decoder_input_details_come_with_details",
    ),
    ("Parameters", "best_of", "api/test_tgi.py::test_best_of_returns_the_most_likely_answer"),
    ("Parameters", "top_n_tokens", "api/test_tgi.py::test_top_tokens_of_each_token"),
    ("Parameters", "grammar", "api/test_tgi.py::test_a_grammar_reaches_the_engine"),
    ("Parameters", "typical_p watermark adapter_id", "api/test_tgi.py::test_an_error_names_the_wrong_parameter"),
    ("GrammarField", "type value", "api/test_tgi.py::test_a_grammar_reaches_the_engine"),
]


def bodies(of: type[Body] = Body) -> Iterator[type[Body]]:
    """Every class of a body, whole or part, that the application knows."""
    for body in of.__subclasses__():
        if body.__module__.startswith("serve_app."):
            yield body
            yield from bodies(body)


def own_fields(body: type[Body]) -> set[str]:
    """What this class declares itself, as a caller writes it."""
    return {field.alias or name for name, field in body.model_fields.items() if name in body.__annotations__}


@cache
def sources(file: str) -> dict[str, str]:
    """The source of each function and constant of a file, by name."""
    text = (TESTS / file).read_text()
    found = {}
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node) or ""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                marks = [ast.get_source_segment(text, mark) or "" for mark in node.decorator_list]
                found[node.name] = "\n".join([*marks, source])
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                found[name] = source
    return found


def source(test: str) -> str:
    """A test's source with the constants of its file that it uses, and those that they do."""
    file, _, name = test.partition("::")
    known, used, left = sources(file), dict[str, str](), [name]
    while left:
        each = left.pop()
        used[each] = known[each]
        words = re.findall(r"\w+", used[each])
        constants = [word for word in words if word.isupper() or word.startswith("every_")]
        left += [word for word in constants if word in known and word not in used]
    return "\n".join(used.values())


def test_every_field_has_its_test() -> None:
    shown = {(body, field) for body, names, _ in SHOWN for field in names.split()}
    assert shown == {(body.__name__, field) for body in bodies() for field in own_fields(body)}
    assert TELLING.keys() == set(SamplingFields.names())


@pytest.mark.parametrize(("body", "names", "test"), SHOWN, ids=[f"{body}: {names}" for body, names, _ in SHOWN])
def test_the_test_of_a_field_is_there_and_names_it(body: str, names: str, test: str) -> None:
    written = source(test)
    assert [name for name in names.split() if not re.search(rf"\b{name}\b", written)] == []


def test_the_document_knows_no_other_bodies() -> None:
    documented = [get_args(one.body) or (one.body,) for one in openapi.OPERATIONS if one.body is not None]
    assert {body for each in documented for body in each} <= set(bodies())


@pytest.mark.parametrize("body", list(bodies()), ids=lambda body: body.__name__)
def test_what_is_no_field_is_refused_by_its_name(body: type[Body]) -> None:
    with pytest.raises(ValidationError) as refused:
        body.model_validate({"surely_none": None})
    assert [fault["loc"] for fault in refused.value.errors() if fault["type"] == "extra_forbidden"] == [
        ("surely_none",)
    ]


# The effects that no other file shows.


def changes(before: GenerationRequest, after: GenerationRequest) -> dict[str, object]:
    return {
        field.name: getattr(new, field.name)
        for old, new in ((before, after), (before.params, after.params))
        for field in fields(old)
        if field.name not in ("id", "params", "arrived", "deadline")
        and getattr(old, field.name) != getattr(new, field.name)
    }


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("field", TELLING)
async def test_a_field_decides_what_it_says_and_nothing_else(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, field: str
) -> None:
    value, decides, becomes = TELLING[field]
    plain = await asked(client, engine, path, {})
    assert changes(plain, await asked(client, engine, path, {field: value})) == {decides: becomes}


async def test_a_salt_keeps_what_is_computed_apart() -> None:
    async with toy() as (client, _):

        async def cached(**fields: str) -> int:
            answer = await client.post("/generate", json={"prompt": "a" * 40, "max_tokens": 1, **fields})
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert [await cached(), await cached()] == [0, 32]
        assert [await cached(cache_salt="mine"), await cached(cache_salt="mine")] == [0, 32]
        assert await cached(cache_salt="yours") == 0


@pytest.mark.parametrize(
    "about", [{"name": "y"}, {"description": "Any."}, {"strict": True}, {"strict": False}], ids=str
)
async def test_what_is_said_about_a_schema_changes_no_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, about: dict[str, object]
) -> None:
    """An answer follows it strictly in any case, and the model is not told of it."""
    shape = {"name": "x", "schema": SCHEMA}
    each = [{"response_format": {"type": "json_schema", "json_schema": said}} for said in (shape, shape | about)]
    one, other = [await asked(client, engine, CHAT, fields) for fields in each]
    assert changes(one, other) == {}


@pytest.mark.parametrize("strict", [True, False, None])
async def test_calls_are_as_strict_as_can_be_whatever_is_said(
    client: httpx.AsyncClient, engine: ScriptedEngine, strict: bool | None
) -> None:
    engine.results[GetModelInfo] = info(HERMES)
    function: dict[str, object] = {**WEATHER["function"], "strict": strict}  # type: ignore[dict-item]
    told = [WEATHER, WEATHER | {"function": function}]
    one, other = [await asked(client, engine, CHAT, TOOLS_CHAT | {"tools": [tool]}) for tool in told]
    assert changes(one, other) == {}
    assert one.params.grammar is not None
