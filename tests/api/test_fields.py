"""Fields of both dialects that reach the engine, and several answers to one prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from serve_app.core.events import Chunk, FinishReason
from serve_app.core.requests import GenerationRequest, Grammar, Prompt, TextPrompt, TokenPrompt
from serve_app.errors import InvalidRequest, QueueFull

from .scripted import POSTS, ScriptedGateway, chunk, frames, told
from .test_openai import both

every_post = pytest.mark.parametrize("path", POSTS)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def asked(client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, fields: object) -> GenerationRequest:
    assert isinstance(fields, dict)
    answer = await client.post(path, json=POSTS[path] | fields)
    assert answer.status_code == 200, answer.text
    return gateway.requests[-1]


async def refused(client: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> tuple[str, str]:
    answer = await client.post(path, json=POSTS[path] | fields)
    assert answer.status_code == 422
    return told(answer)["param"], told(answer)["message"]


@every_post
async def test_what_changes_the_text_arrives(client: httpx.AsyncClient, gateway: ScriptedGateway, path: str) -> None:
    fields = {
        "logit_bias": {"7": -100, "12": 0.5},
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "truncate_prompt_tokens": 5,
        "priority": -3,
        "cache_salt": "mine",
    }
    request = await asked(client, gateway, path, fields)
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
async def test_what_the_answer_looks_like_arrives_by_the_name_of_its_field(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, field: str, value: object, kind: Any, text: str
) -> None:
    request = await asked(client, gateway, path, {field: value})
    assert request.params.grammar == Grammar(kind, text, field)


@both
@pytest.mark.parametrize(
    ("said", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object", field="response_format")),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            Grammar("json_schema", json.dumps(SCHEMA), "response_format"),
        ),
    ],
)
async def test_a_response_format_is_a_grammar(
    client: httpx.AsyncClient,
    gateway: ScriptedGateway,
    path: str,
    body: dict[str, object],
    said: object,
    grammar: Grammar | None,
) -> None:
    assert (await asked(client, gateway, path, {"response_format": said})).params.grammar == grammar


@every_post
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 for as many"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"priority": 2**31}, "priority", "less than or equal to"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"guided_json": "{}"}, "guided_json", "valid dictionary"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "send one"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    named, message = await refused(client, path, fields)
    assert named.startswith(param)
    assert says in message


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "exactly when its type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "shema": 1}}},
            "response_format.json_schema.shema",
            "did you mean schema?",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "send one"),
    ],
)
async def test_a_wrong_field_of_openais_is_named(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    named, message = await refused(client, path, fields)
    assert named == param
    assert says in message


def by_number(request: GenerationRequest) -> Iterable[Chunk]:
    """Answer i is i, in as many tokens and one more."""
    letters = [str(request.index)] * (request.index + 2)
    return [chunk(letters[:1], None), chunk(letters[1:], FinishReason.LENGTH, start=1)]


@both
async def test_several_answers_are_forks_of_one_request(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, object]
) -> None:
    gateway.script = by_number
    answer = (await client.post(path, json=body | {"n": 3, "seed": 5})).json()
    first, *others = gateway.requests
    assert [request.index for request in gateway.requests] == [0, 1, 2]
    assert {request.group for request in gateway.requests} == {first.group}
    assert first.group
    assert len({request.id for request in gateway.requests}) == 3
    assert all((r.prompt, r.params) == (first.prompt, first.params) for r in others)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    said = [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]
    assert said == ["00", "111", "2222"]
    assert answer["usage"]["prompt_tokens"] == 3, "of a prompt that was computed once"
    assert answer["usage"]["completion_tokens"] == 2 + 3 + 4


@both
async def test_several_answers_are_streamed_as_they_come_and_end_together(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, object]
) -> None:
    gateway.script = by_number
    fields = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    *found, usage, end = frames((await client.post(path, json=body | fields)).text)
    assert end == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
    assert len({frame["id"] for frame in found}) == 1
    said = {0: "", 1: "", 2: ""}
    ended = []
    for frame in found:
        (choice,) = frame["choices"]
        said[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content", "")
        ended += [choice["index"]] if choice["finish_reason"] else []
    assert said == {0: "00", 1: "111", 2: "2222"}
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
async def test_a_list_of_prompts_has_their_answers_in_order(
    client: httpx.AsyncClient, gateway: ScriptedGateway, prompt: object, prompts: list[Prompt], n: int
) -> None:
    gateway.script = by_number
    answer = (await client.post("/v1/completions", json={"prompt": prompt, "n": n})).json()
    assert [request.prompt for request in gateway.requests] == [one for one in prompts for _ in range(n)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(n * len(prompts)))
    assert [choice["text"] for choice in answer["choices"]] == ["00", "111"][:n] * len(prompts)
    assert answer["usage"]["prompt_tokens"] == 3 * len(prompts)
    assert len({request.group for request in gateway.requests}) == (1 if n == 1 else len(prompts))
    assert len({request.id for request in gateway.requests}) == len(gateway.requests)


@pytest.mark.parametrize(
    ("prompt", "param"), [([], "prompt"), (["a", 1], "prompt[1]"), ([[1], []], "prompt[1]"), ([["a"]], "prompt[0][0]")]
)
async def test_a_list_that_is_none_of_prompts_is_refused(client: httpx.AsyncClient, prompt: object, param: str) -> None:
    named, _ = await refused(client, "/v1/completions", {"prompt": prompt})
    assert named == param


async def test_a_call_asks_for_so_many_answers_and_no_more(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    named, message = await refused(client, "/v1/completions", {"prompt": ["a"] * 17, "n": 3})
    assert (named, gateway.requests) == ("prompt", [])
    assert "51 answers; ask for at most 50" in message
    answer = (await client.post("/v1/completions", json={"prompt": ["a"] * 10, "n": 5})).json()
    assert len(answer["choices"]) == 50
    assert gateway.most_running <= 32


@both
@pytest.mark.parametrize("streamed", [True, False])
async def test_one_answer_that_fails_ends_them_all(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, object], streamed: bool
) -> None:
    """Before anything was sent it keeps its status."""

    def script(request: GenerationRequest) -> Iterable[Any]:
        return [QueueFull("full", retry_after_s=1)] if request.index == 1 else [None]

    gateway.script = script
    answer = await client.post(path, json=body | {"n": 3, "stream": streamed})
    assert answer.status_code == 429
    assert gateway.running == 0
    assert len(gateway.refusals) == 1


@both
async def test_an_answer_that_fails_on_the_way_ends_them_all_in_band(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, object]
) -> None:
    def script(request: GenerationRequest) -> Iterable[Any]:
        last = InvalidRequest("it cannot be followed", param="guided_regex") if request.index == 1 else None
        return [chunk(["a"], None), 0.05, last]

    gateway.script = script
    *_, failure, end = frames((await client.post(path, json=body | {"n": 2, "stream": True})).text)
    assert failure["error"]["param"] == "guided_regex"
    assert end == "[DONE]"
    assert gateway.running == 0
    assert len(gateway.refusals) == 1
