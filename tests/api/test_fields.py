"""Fields of the native and OpenAI's bodies that reach the engine, and several answers to one prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from serve_app.core.events import Chunk, FinishReason
from serve_app.core.requests import GenerationRequest, Grammar, Prompt, TextPrompt, TokenPrompt
from serve_app.errors import InvalidRequest, QueueFull

from .scripted import POSTS, ScriptedEngine, ScriptedTelemetry, assert_invalid, chunk, error_of, events_of
from .test_openai import both

every_post = pytest.mark.parametrize("path", POSTS)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def request_of(client: httpx.AsyncClient, engine: ScriptedEngine, path: str, fields: object) -> GenerationRequest:
    assert isinstance(fields, dict)
    answer = await client.post(path, json=POSTS[path] | fields)
    assert answer.status_code == 200, answer.text
    return engine.requests[-1]


async def invalid(client: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> tuple[str, str]:
    answer = await client.post(path, json=POSTS[path] | fields)
    assert_invalid(answer)
    return error_of(answer)["param"], error_of(answer)["message"]


@every_post
async def test_sampling_and_scheduling_fields_reach_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    fields = {
        "logit_bias": {"7": -100, "12": 0.5},
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "truncate_prompt_tokens": 5,
        "priority": -3,
        "cache_salt": "mine",
    }
    request = await request_of(client, engine, path, fields)
    assert request.params.logit_bias == ((7, -100), (12, 0.5))
    assert not request.params.skip_special_tokens
    assert request.params.include_stop_str_in_output
    assert (request.truncate_prompt_tokens, request.priority, request.cache_salt) == (5, -3, "mine")
    assert (request.group, request.index, request.params.grammar) == ("", 0, None)


@every_post
@pytest.mark.parametrize(
    ("field", "value", "kind", "text"),
    [
        ("guided_json", SCHEMA, "json_schema", json.dumps(SCHEMA)),
        ("guided_regex", "a+", "regex", "a+"),
        ("guided_choice", ["yes", "no"], "choice", '["yes", "no"]'),
        ("guided_grammar", 'start: "a"', "lark", 'start: "a"'),
    ],
)
async def test_a_guided_field_reaches_the_engine_as_a_grammar(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, field: str, value: object, kind: Any, text: str
) -> None:
    request = await request_of(client, engine, path, {field: value})
    assert request.params.grammar == Grammar(kind, text, field)


@both
@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object", field="response_format")),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            Grammar("json_schema", json.dumps(SCHEMA), "response_format"),
        ),
    ],
)
async def test_a_response_format_reaches_the_engine_as_a_grammar(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    path: str,
    body: dict[str, object],
    response_format: object,
    grammar: Grammar | None,
) -> None:
    assert (await request_of(client, engine, path, {"response_format": response_format})).params.grammar == grammar


@every_post
@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 for as many"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"priority": 2**31}, "priority", "less than or equal to"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"guided_json": "{}"}, "guided_json", "valid dictionary"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "Send one"),
    ],
)
async def test_an_error_names_the_invalid_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, expected: str
) -> None:
    named, message = await invalid(client, path, fields)
    assert named.startswith(param)
    assert expected in message


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema', 'json' or 'regex'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "should have 'json_schema' when its type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "shema": 1}}},
            "response_format.json_schema.shema",
            "Did you mean 'schema'?",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "Send one"),
    ],
)
async def test_an_error_names_the_wrong_openai_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, expected: str
) -> None:
    named, message = await invalid(client, path, fields)
    assert named == param
    assert expected in message


def by_number(request: GenerationRequest) -> Iterable[Chunk]:
    """Answer i consists of i + 2 tokens with the text i."""
    letters = [str(request.index)] * (request.index + 2)
    return [chunk(letters[:1], None), chunk(letters[1:], FinishReason.LENGTH, start=1)]


@both
async def test_several_answers_are_forks_of_one_request(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    engine.script = by_number
    answer = (await client.post(path, json=body | {"n": 3, "seed": 5})).json()
    first, *others = engine.requests
    assert [request.index for request in engine.requests] == [0, 1, 2]
    assert {request.group for request in engine.requests} == {first.group}
    assert first.group
    assert len({request.id for request in engine.requests}) == 3
    assert all((r.prompt, r.params) == (first.prompt, first.params) for r in others)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["00", "111", "2222"]
    assert answer["usage"]["prompt_tokens"] == 3, "the prompt is computed once"
    assert answer["usage"]["completion_tokens"] == 2 + 3 + 4


@both
async def test_several_answers_are_streamed_with_one_end(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    engine.script = by_number
    fields = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    *found, usage, end = events_of((await client.post(path, json=body | fields)).text)
    assert end == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
    assert len({event["id"] for event in found}) == 1
    texts = {0: "", 1: "", 2: ""}
    ended = []
    for event in found:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content", "")
        ended += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {0: "00", 1: "111", 2: "2222"}
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([[1, 2], [3]], [TokenPrompt((1, 2)), TokenPrompt((3,))]),
        (["a"], [TextPrompt("a")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2])
async def test_a_list_of_prompts_has_answers_in_order(
    client: httpx.AsyncClient, engine: ScriptedEngine, prompt: object, prompts: list[Prompt], n: int
) -> None:
    engine.script = by_number
    answer = (await client.post("/v1/completions", json={"prompt": prompt, "n": n})).json()
    assert [request.prompt for request in engine.requests] == [one for one in prompts for _ in range(n)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(n * len(prompts)))
    assert [choice["text"] for choice in answer["choices"]] == ["00", "111"][:n] * len(prompts)
    assert answer["usage"]["prompt_tokens"] == 3 * len(prompts)
    assert len({request.group for request in engine.requests}) == (1 if n == 1 else len(prompts))
    assert len({request.id for request in engine.requests}) == len(engine.requests)


@pytest.mark.parametrize(
    ("prompt", "param"), [([], "prompt"), (["a", 1], "prompt[1]"), ([[1], []], "prompt[1]"), ([["a"]], "prompt[0][0]")]
)
async def test_a_list_that_holds_no_prompts_is_refused(client: httpx.AsyncClient, prompt: object, param: str) -> None:
    named, _ = await invalid(client, "/v1/completions", {"prompt": prompt})
    assert named == param


async def test_a_call_with_too_many_answers_is_refused(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    named, message = await invalid(client, "/v1/completions", {"prompt": ["a"] * 17, "n": 3})
    assert (named, engine.requests) == ("prompt", [])
    assert "51 answers. Ask for at most 50" in message
    answer = (await client.post("/v1/completions", json={"prompt": ["a"] * 10, "n": 5})).json()
    assert len(answer["choices"]) == 50
    assert engine.max_running <= 32


@both
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_of_one_answer_before_the_response_is_a_status(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    body: dict[str, object],
    streamed: bool,
) -> None:
    def script(request: GenerationRequest) -> Iterable[Any]:
        return [QueueFull("full", retry_after_s=1)] if request.index == 1 else [None]

    engine.script = script
    answer = await client.post(path, json=body | {"n": 3, "stream": streamed})
    assert answer.status_code == 429
    assert engine.running == 0
    assert len(telemetry.errors) == 1


@both
async def test_an_error_of_one_answer_ends_the_stream(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, body: dict[str, object]
) -> None:
    def script(request: GenerationRequest) -> Iterable[Any]:
        last = InvalidRequest("The grammar is invalid.", param="guided_regex") if request.index == 1 else None
        return [chunk(["a"], None), 0.05, last]

    engine.script = script
    *_, failure, end = events_of((await client.post(path, json=body | {"n": 2, "stream": True})).text)
    assert failure["error"]["param"] == "guided_regex"
    assert end == "[DONE]"
    assert engine.running == 0
    assert len(telemetry.errors) == 1
