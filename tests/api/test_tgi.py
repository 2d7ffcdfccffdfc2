"""Text Generation Inference's dialect: its bodies, its answers, its errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from huggingface_hub import TextGenerationOutput, TextGenerationStreamOutput
from hypothesis import assume, given, strategies as st

from serve_app import __version__
from serve_app.api.app import create_app
from serve_app.api.body import parse_document
from serve_app.api.tgi.schema import GrammarField, Parameters, TgiBody
from serve_app.core.events import Chunk, FinishReason, Logprobs, PromptDetails, TextToken, TokenEvent, TokenLogprob
from serve_app.core.queries import GetModelInfo, ModelInfo, ModelState, ModelStatus
from serve_app.core.requests import GenerationRequest, Grammar, SamplingParams, TextPrompt
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    QueueFull,
    ServeAppError,
)

from .scripted import BEAT, ScriptedGateway, Wire, app_config, chunk, frames
from .test_bodies import CHARACTERS, DOCUMENTS, anything
from .toy import toy

INPUTS = {"inputs": "a b c"}
READ = {**INPUTS, "parameters": {"decoder_input_details": True}}
END = 2  # the scripted model's only special token
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# How each path says whether it streams.
WHOLE = ["/generate", "/"]
STREAMS: list[tuple[str, dict[str, object]]] = [("/generate_stream", {}), ("/", {"stream": True})]
every_path = pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
every_stream = pytest.mark.parametrize(("path", "more"), STREAMS)


def event(
    id: int, text: str, finish: FinishReason | None = None, logprob: float = -0.5, by: str | int | None = None
) -> TokenEvent:
    logprobs = Logprobs(TokenLogprob(id, f"<{id}>", logprob), (TokenLogprob(END, "<2>", -0.25),))
    return TokenEvent(id, text, 0.1, finish, logprobs, by)


def said(*events: TokenEvent) -> Chunk:
    return Chunk(events, prompt_tokens=3, queue_s=0.0)


async def post(client: httpx.AsyncClient, path: str, parameters: dict[str, Any], **more: object) -> httpx.Response:
    return await client.post(path, json={**INPUTS, "parameters": parameters, **more})


async def whole(client: httpx.AsyncClient, path: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The answer, which is the only one of a list at the compatible route."""
    answer = await post(client, path, parameters)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    if path == "/":
        (document,) = document
    TextGenerationOutput.parse_obj_as_instance(document)
    found: dict[str, Any] = document
    return found


async def stream(client: httpx.AsyncClient, path: str, parameters: dict[str, Any], **more: object) -> list[Any]:
    answer = await post(client, path, parameters, **more)
    assert answer.headers["content-type"] == "text/event-stream"
    found = frames(answer.text)
    for frame in found:
        TextGenerationStreamOutput.parse_obj_as_instance(frame)
    return found


async def asked(client: httpx.AsyncClient, gateway: ScriptedGateway, **parameters: Any) -> SamplingParams:
    await whole(client, "/generate", parameters)
    return gateway.requests[-1].params


def error(answer: httpx.Response) -> tuple[str, str]:
    """What is wrong and of which kind, checked to be whole."""
    body = answer.json()
    assert set(body) == {"error", "error_type"}
    return body["error"], body["error_type"]


@pytest.mark.parametrize("path", WHOLE)
async def test_a_whole_answer_is_its_text(client: httpx.AsyncClient, gateway: ScriptedGateway, path: str) -> None:
    assert await whole(client, path, {}) == {"generated_text": "abc"}
    (request,) = gateway.requests
    assert (request.model, request.prompt, request.truncate_prompt_tokens) == ("small", TextPrompt("a b c"), None)
    assert request.params == SamplingParams(
        max_tokens=100, temperature=0, top_p=0.9, include_stop_str_in_output=True, logprobs=None
    )
    assert gateway.questions == [], "which tokens are special does not matter for the text"
    assert gateway.warm_waits == [30.0]


@pytest.mark.parametrize("path", WHOLE)
async def test_details_are_every_token(client: httpx.AsyncClient, gateway: ScriptedGateway, path: str) -> None:
    gateway.plays(said(event(7, "a"), event(8, "")), said(event(9, "é"), event(END, "", FinishReason.STOP)))
    assert await whole(client, path, {"details": True}) == {
        "generated_text": "aé",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 4,
            "seed": None,
            "prefill": [],
            "tokens": [
                {"id": 7, "text": "a", "logprob": -0.5, "special": False},
                {"id": 8, "text": "", "logprob": -0.5, "special": False},
                {"id": 9, "text": "é", "logprob": -0.5, "special": False},
                {"id": END, "text": "<2>", "logprob": -0.5, "special": True},
            ],
        },
    }


@every_stream
async def test_a_stream_is_an_event_for_every_token(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, more: dict[str, object]
) -> None:
    gateway.plays(said(event(7, "a")), said(event(8, "b"), event(END, "", FinishReason.STOP)))
    found = await stream(client, path, {"details": True, "do_sample": True, "seed": 5}, **more)
    token = {"logprob": -0.5, "special": False}
    assert found == [
        {"index": 1, "token": {"id": 7, "text": "a", **token}, "generated_text": None, "details": None},
        {"index": 2, "token": {"id": 8, "text": "b", **token}, "generated_text": None, "details": None},
        {
            "index": 3,
            "token": {"id": END, "text": "<2>", "logprob": -0.5, "special": True},
            "generated_text": "ab",
            "details": {"finish_reason": "eos_token", "generated_tokens": 3, "seed": 5, "input_length": 3},
        },
    ]
    assert gateway.requests[0].params.logprobs == 0
    assert gateway.warm_waits == [None]


@every_stream
async def test_a_stream_tells_its_end_only_when_asked(
    client: httpx.AsyncClient, path: str, more: dict[str, object]
) -> None:
    last = (await stream(client, path, {}, **more))[-1]
    assert (last["generated_text"], last["details"]) == ("abc", None)


@pytest.mark.parametrize(
    ("finish", "by", "reason"),
    [
        (FinishReason.LENGTH, None, "length"),
        (FinishReason.STOP, None, "eos_token"),
        (FinishReason.STOP, "b", "stop_sequence"),
        (FinishReason.STOP, 7, "stop_sequence"),
    ],
)
async def test_what_ended_an_answer_has_tgis_name(
    client: httpx.AsyncClient, gateway: ScriptedGateway, finish: FinishReason, by: str | int | None, reason: str
) -> None:
    gateway.plays(said(event(7, "a"), event(8, "b", finish, by=by)))
    for path in WHOLE:
        assert (await whole(client, path, {"details": True}))["details"]["finish_reason"] == reason
    for path, more in STREAMS:
        last = (await stream(client, path, {"details": True}, **more))[-1]
        assert last["details"]["finish_reason"] == reason


async def test_what_is_special_is_asked_once_and_kept(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    for _ in range(2):
        await whole(client, "/generate", {"details": True})
        await stream(client, "/generate_stream", {})
    assert gateway.questions == [("small", GetModelInfo())]


async def test_every_parameter_arrives(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    parameters = {
        "max_new_tokens": 5,
        "do_sample": True,
        "temperature": 2.5,
        "top_k": 4,
        "top_p": 0.5,
        "repetition_penalty": 1.2,
        "frequency_penalty": -2,
        "seed": 9,
        "stop": ["x", "yz"],
        "details": True,
        "top_n_tokens": 3,
        "typical_p": None,
        "watermark": False,
        "decoder_input_details": False,
        "adapter_id": None,
    }
    assert await asked(client, gateway, **parameters) == SamplingParams(
        max_tokens=5,
        temperature=2.5,
        top_k=4,
        top_p=0.5,
        repetition_penalty=1.2,
        frequency_penalty=-2,
        seed=9,
        stop=("x", "yz"),
        logprobs=3,
        include_stop_str_in_output=True,
    )
    await whole(client, "/generate", {"truncate": 7})
    assert gateway.requests[-1].truncate_prompt_tokens == 7


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0),
        ({"do_sample": False}, 0),
        ({"do_sample": False, "temperature": 0.7}, 0),
        ({"temperature": 1.0}, 0),
        ({"do_sample": True}, 0.2),
        ({"do_sample": True, "temperature": 1.0}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 4}, 0.2),
        ({"top_p": 0.4}, 0.2),
    ],
)
async def test_what_samples_and_what_is_greedy(
    client: httpx.AsyncClient, gateway: ScriptedGateway, parameters: dict[str, Any], temperature: float
) -> None:
    """The scripted model's own temperature is 0.2. What samples has a seed, told so that it can be said again."""
    params = await asked(client, gateway, **parameters)
    assert params.temperature == temperature
    assert (params.seed is None) == (temperature == 0)
    told = (await whole(client, "/generate", {**parameters, "details": True}))["details"]["seed"]
    assert told == gateway.requests[-1].params.seed


async def test_a_greedy_model_samples_when_told_to(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    await client.post("/generate", json={**INPUTS, "model": "org/large", "parameters": {"do_sample": True}})
    assert gateway.requests[-1].params.temperature == 1.0


async def test_an_answer_without_a_seed_of_its_callers_draws_a_new_one(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    seeds = {(await asked(client, gateway, do_sample=True)).seed for _ in range(5)}
    assert len(seeds) == 5


async def test_a_greedy_answer_tells_no_seed(client: httpx.AsyncClient) -> None:
    assert (await whole(client, "/generate", {"details": True, "seed": 5}))["details"]["seed"] is None


@pytest.mark.parametrize("full", [True, False])
async def test_the_full_text_begins_with_the_prompt(client: httpx.AsyncClient, full: bool) -> None:
    text = "a b cabc" if full else "abc"
    for path in WHOLE:
        assert (await whole(client, path, {"return_full_text": full}))["generated_text"] == text
    for path, more in STREAMS:
        first, *_, last = await stream(client, path, {"return_full_text": full}, **more)
        assert (first["token"]["text"], last["generated_text"]) == ("a", text)


async def test_the_likeliest_tokens_come_with_each(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(said(event(7, "a"), event(8, "b", FinishReason.LENGTH)))
    top = [{"id": END, "text": "<2>", "logprob": -0.25, "special": True}]
    details = (await whole(client, "/generate", {"details": True, "top_n_tokens": 1}))["details"]
    assert details["top_tokens"] == [top, top]
    assert gateway.requests[-1].params.logprobs == 1
    found = await stream(client, "/generate_stream", {"top_n_tokens": 1})
    assert [frame["top_tokens"] for frame in found] == [top, top]
    assert "top_tokens" not in (await stream(client, "/generate_stream", {"top_n_tokens": 0}))[0]


@pytest.mark.parametrize(
    ("said", "grammar"),
    [
        ({"type": "json", "value": SCHEMA}, Grammar("json_schema", json.dumps(SCHEMA), "parameters.grammar")),
        ({"type": "json", "value": '{"a": 1}'}, Grammar("json_schema", '{"a": 1}', "parameters.grammar")),
        ({"type": "json_object", "value": SCHEMA}, Grammar("json_schema", json.dumps(SCHEMA), "parameters.grammar")),
        (
            {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA, "strict": True}},
            Grammar("json_schema", json.dumps(SCHEMA), "parameters.grammar"),
        ),
        ({"type": "regex", "value": "a+"}, Grammar("regex", "a+", "parameters.grammar")),
    ],
)
async def test_a_grammar_arrives(
    client: httpx.AsyncClient, gateway: ScriptedGateway, said: object, grammar: Grammar
) -> None:
    assert (await asked(client, gateway, grammar=said)).grammar == grammar


def by_number(request: GenerationRequest) -> Iterable[Chunk]:
    """Of the answers number 1 is the likeliest by the token, number 0 in sum."""
    logprob, length = [(-0.6, 1), (-0.5, 2), (-0.9, 3)][request.index]
    events = [event(7, str(request.index), logprob=logprob) for _ in range(length - 1)]
    return [said(*events, event(8, str(request.index), FinishReason.LENGTH, logprob))]


@pytest.mark.parametrize("path", WHOLE)
async def test_the_best_of_several_is_the_likeliest_by_the_token(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    gateway.script = by_number
    parameters = {"best_of": 3, "do_sample": True, "seed": 10}
    assert await whole(client, path, parameters) == {"generated_text": "11"}
    assert [request.index for request in gateway.requests] == [0, 1, 2]
    (group,) = {request.group for request in gateway.requests}
    assert group, "the prompt is computed once"
    found = await whole(client, path, {**parameters, "details": True, "return_full_text": True})
    details = found["details"]
    others = details["best_of_sequences"]
    assert (found["generated_text"], details["seed"], len(details["tokens"])) == ("a b c11", 11, 2)
    assert [(one["generated_text"], one["seed"], one["generated_tokens"]) for one in others] == [
        ("a b c0", 10, 1),
        ("a b c222", 12, 3),
    ]
    assert set(others[0]) == {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}


async def test_one_answer_has_no_others(client: httpx.AsyncClient) -> None:
    details = (await whole(client, "/generate", {"best_of": 1, "details": True}))["details"]
    assert "best_of_sequences" not in details


def read(request: GenerationRequest) -> Iterable[Chunk]:
    """Tells of its prompt whatever of it was asked for; the third token cannot occur."""
    pieces = (TextToken(END, "<2>", 0, 0), TextToken(20, "a b", 0, 3), TextToken(30, " c", 3, 5))
    logprobs = (Logprobs(TokenLogprob(20, "a b", -0.7), ()), Logprobs(TokenLogprob(30, " c", float("-inf")), ()))
    known = request.params.prompt_logprobs is not None
    prompt = PromptDetails(pieces if request.prompt_details else (), "a b c", logprobs if known else ())
    told = prompt if known or request.prompt_details else None
    return [replace(one, prompt=told) for one in by_number(request)]


PREFILL = [
    {"id": END, "text": "<2>", "logprob": None},
    {"id": 20, "text": "a b", "logprob": -0.7},
    {"id": 30, "text": " c", "logprob": -9999.0},
]


@pytest.mark.parametrize("path", WHOLE)
@pytest.mark.parametrize("details", [{}, {"details": True}, {"details": False}], ids=str)
async def test_the_details_of_the_prompt_come_with_those_of_the_answer(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, details: dict[str, bool]
) -> None:
    gateway.script = read
    told = (await whole(client, path, {**details, "decoder_input_details": True}))["details"]
    assert told["prefill"] == PREFILL
    assert [token["id"] for token in told["tokens"]] == [8]
    (request,) = gateway.requests
    assert (request.prompt_details, request.params.prompt_logprobs) == (True, 0)


async def test_a_prompt_is_read_once_for_the_best_of_several(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    gateway.script = read
    asked = {"best_of": 3, "do_sample": True, "decoder_input_details": True}
    details = (await whole(client, "/generate", asked))["details"]
    assert [one["prefill"] for one in (details, *details["best_of_sequences"])] == [PREFILL] * 3
    assert [request.prompt_details for request in gateway.requests] == [True, False, False]
    assert [request.params.prompt_logprobs for request in gateway.requests] == [0, None, None]


@pytest.mark.parametrize("parameters", [{"details": True}, {"details": True, "decoder_input_details": False}], ids=str)
async def test_nothing_is_told_of_a_prompt_unless_asked(
    client: httpx.AsyncClient, gateway: ScriptedGateway, parameters: dict[str, bool]
) -> None:
    gateway.script = read
    assert (await whole(client, "/generate", parameters))["details"]["prefill"] == []
    assert (gateway.requests[0].prompt_details, gateway.requests[0].params.prompt_logprobs) == (False, None)


async def test_an_engine_reads_what_is_left_of_the_prompt() -> None:
    async with toy() as (client, _):
        body = {"inputs": "abcdef", "parameters": {"max_new_tokens": 2, "truncate": 3, "decoder_input_details": True}}
        answer = (await client.post("/generate", json=body)).json()
        best = {"best_of": 2, "do_sample": True, "decoder_input_details": True, "max_new_tokens": 1}
        several = (await client.post("/generate", json={"inputs": "ab", "parameters": best})).json()["details"]
    assert answer["generated_text"] == "de"
    assert answer["details"]["prefill"] == [
        {"id": ord("d"), "text": "d", "logprob": None},
        {"id": ord("e"), "text": "e", "logprob": 0.0},
        {"id": ord("f"), "text": "f", "logprob": 0.0},
    ]
    assert several["prefill"] == several["best_of_sequences"][0]["prefill"]
    assert [token["logprob"] for token in several["prefill"]] == [None, 0.0]


REFUSED = [
    ({"max_new_tokens": 0}, "parameters.max_new_tokens should be greater"),
    ({"temperature": 0}, "parameters.temperature should be greater than 0"),
    ({"temperature": "1"}, "parameters.temperature should be a valid number"),
    ({"top_k": 0}, "parameters.top_k should be greater"),
    ({"top_p": 1.0}, "parameters.top_p should be less than 1"),
    ({"top_p": 0.0}, "parameters.top_p should be greater than 0"),
    ({"typical_p": 0.9}, "parameters.typical_p is not honoured here; leave it out"),
    ({"repetition_penalty": 0}, "parameters.repetition_penalty should be greater than 0"),
    ({"frequency_penalty": 3}, "parameters.frequency_penalty should be less"),
    ({"seed": -1}, "parameters.seed should be greater"),
    ({"stop": "a"}, "parameters.stop should be a valid list"),
    ({"stop": [""]}, "parameters.stop[0]"),
    ({"stop": ["a"] * 17}, "parameters.stop"),
    ({"truncate": 0}, "parameters.truncate should be greater"),
    ({"watermark": True}, "parameters.watermark is not honoured here"),
    ({"adapter_id": "mine"}, "parameters.adapter_id is not honoured here"),
    ({"decoder_input_details": 1}, "parameters.decoder_input_details should be a valid boolean"),
    ({"best_of": 17, "do_sample": True}, "parameters.best_of should be less"),
    ({"best_of": 0}, "parameters.best_of should be greater"),
    ({"top_n_tokens": 21}, "parameters.top_n_tokens should be less"),
    ({"max_tokens": 3}, "parameters.max_tokens is not a field here; did you mean max_new_tokens?"),
    ({"grammar": {"type": "regex"}}, "parameters.grammar.value is required"),
    ({"grammar": {"type": "regex", "value": ""}}, "parameters.grammar should have a regular expression"),
    ({"grammar": {"type": "json", "value": "[1]"}}, "parameters.grammar should have a JSON schema"),
    ({"grammar": {"type": "json", "value": "{"}}, "parameters.grammar should have a JSON schema"),
    ({"grammar": {"type": "json", "value": "[" * 9000}}, "parameters.grammar should have a JSON schema"),
    ({"grammar": {"type": "json_schema", "value": SCHEMA}}, 'parameters.grammar should have an object with "schema"'),
    ({"grammar": {"type": "json_schema", "value": {"schema": {}, "name": 1}}}, "parameters.grammar should have"),
    ({"grammar": {"type": "lark", "value": "a"}}, "parameters.grammar.type should be"),
    ({"grammar": {"type": "regex", "value": "a", "vlue": 1}}, "parameters.grammar.vlue is not a field here"),
]


@every_path
@pytest.mark.parametrize(("parameters", "says"), REFUSED, ids=lambda value: str(value)[:40])
async def test_a_wrong_parameter_is_named(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, parameters: dict[str, Any], says: str
) -> None:
    answer = await post(client, path, parameters)
    assert answer.status_code == 422
    message, kind = error(answer)
    assert (message.startswith(says), kind) == (True, "validation"), message
    assert (gateway.requests, len(gateway.refusals)) == ([], 1)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/generate", {"inputs": ""}, "inputs"),
        ("/generate", {"inputs": ["a"]}, "inputs should be a valid string"),
        ("/generate", {**INPUTS, "prompt": "a"}, "prompt is not a field here"),
        ("/generate", {**INPUTS, "stream": True}, "stream: true goes to /generate_stream"),
        ("/generate_stream", {**INPUTS, "stream": False}, "stream: false goes to /generate"),
        ("/generate", {**INPUTS, "parameters": []}, "parameters should be an object"),
        ("/", {}, "inputs is required"),
        ("/", [], "expected a JSON object"),
        ("/generate_stream", READ, "parameters.decoder_input_details is told with a whole answer"),
        ("/", {**READ, "stream": True}, "parameters.decoder_input_details is told with a whole answer"),
        ("/generate", {**INPUTS, "parameters": {"best_of": 2}}, "parameters.best_of 2 would be the same greedy"),
        ("/generate_stream", {**INPUTS, "parameters": {"best_of": 2, "top_k": 4}}, "parameters.best_of 2 is known"),
        ("/", {**INPUTS, "stream": True, "parameters": {"best_of": 2, "top_k": 4}}, "parameters.best_of 2 is known"),
    ],
)  # fmt: skip
async def test_a_wrong_body_is_told_in_tgis_shape(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: object, says: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 422
    message, kind = error(answer)
    assert (message.startswith(says), kind) == (True, "validation"), message
    assert gateway.requests == []


async def test_what_cannot_be_read_is_told_in_tgis_shape_at_its_own_route(client: httpx.AsyncClient) -> None:
    answer = await client.post("/", content=b"{")
    assert (answer.status_code, error(answer)[1]) == (422, "validation")
    answer = await client.post("/", content=b"x" * 20_001)
    assert (answer.status_code, error(answer)[1]) == (413, "validation")
    assert "error_type" not in (await client.post("/generate", content=b"{")).json(), "nobody knows the dialect yet"


async def test_more_answers_than_one_call_may_have_are_refused() -> None:
    gateway = ScriptedGateway()
    transport = httpx.ASGITransport(create_app(gateway, app_config(max_batch_items=3)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await post(client, "/generate", {"best_of": 4, "do_sample": True})
        assert (answer.status_code, error(answer)[0][:18]) == (422, "parameters.best_of")
        assert (await client.get("/info")).json()["max_best_of"] == 3
    assert gateway.requests == []


ERRORS: list[tuple[ServeAppError, int, str]] = [
    (ModelNotFound("it has just gone"), 404, "validation"),
    (QueueFull("full", retry_after_s=1.2), 429, "overloaded"),
    (NotReady("it is being loaded", retry_after_s=1.2), 503, "overloaded"),
    (DeadlineExceeded("600 s are over"), 504, "incomplete_generation"),
    (InternalError("it failed"), 500, "generation"),
]
every_error = pytest.mark.parametrize(("failure", "status", "kind"), ERRORS, ids=[e.code for e, _, _ in ERRORS])


@every_path
@every_error
async def test_an_error_keeps_its_status(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, failure: ServeAppError, status: int, kind: str
) -> None:
    gateway.plays(failure)
    answer = await client.post(path, json=INPUTS)
    assert (answer.status_code, error(answer)) == (status, (failure.message, kind))
    assert answer.headers.get("retry-after") == ("2" if failure.retry_after_s else None)
    assert gateway.refusals == [(failure, "small")]


@every_stream
@every_error
async def test_an_error_on_the_way_comes_in_band(
    client: httpx.AsyncClient,
    gateway: ScriptedGateway,
    path: str,
    more: dict[str, object],
    failure: ServeAppError,
    status: int,
    kind: str,
) -> None:
    gateway.plays(chunk(["a"], None), failure)
    *before, last = frames((await post(client, path, {}, **more)).text)
    assert len(before) == 1
    assert last == {"error": failure.message, "error_type": kind}
    assert gateway.refusals == [(failure, "small")]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_model_that_cannot_say_what_is_special_fails_the_answer(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    gateway.answers[GetModelInfo] = NotReady("it has just gone", retry_after_s=1)
    answer = await post(client, path, {"details": True})
    assert (answer.status_code, error(answer)) == (503, ("it has just gone", "overloaded"))
    assert gateway.running == 0


async def test_what_nobody_expected_is_told_in_tgis_shape(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(RuntimeError("a secret"))
    answer = await client.post("/", json=INPUTS)
    message, kind = error(answer)
    assert (answer.status_code, kind) == (500, "generation")
    assert "secret" not in message


async def test_a_silent_stream_says_that_it_waits(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(BEAT, chunk(["a"]))
    text = (await client.post("/generate_stream", json=INPUTS)).text
    assert text.startswith(": warming\n\n")
    assert frames(text)[-1]["generated_text"] == "a"


@pytest.mark.parametrize(("path", "more"), [*STREAMS, ("/generate", {}), ("/", {})])
async def test_who_leaves_takes_the_request_along(gateway: ScriptedGateway, path: str, more: dict[str, object]) -> None:
    gateway.plays(chunk(["a"], None), None)
    wire = Wire(path, {**INPUTS, **more})
    app = create_app(gateway, app_config())
    served = asyncio.create_task(app(wire.scope, wire.receive, wire.send))
    await gateway.crowded.wait()
    wire.leave.set()
    await served
    assert (gateway.running, gateway.completed, len(gateway.closed), gateway.refusals) == (0, 0, 1, [])


@pytest.mark.parametrize(
    ("query", "body", "model"),
    [("", {}, "small"), ("?model=org/large", {}, "org/large"), ("?model=org/large", {"model": "small"}, "small")],
)
@every_path
async def test_a_model_is_named_by_the_body_or_by_the_address(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, query: str, body: dict[str, object], model: str
) -> None:
    assert (await client.post(path + query, json={**INPUTS, **body})).status_code == 200
    assert gateway.requests[-1].model == model
    answer = await client.post(path + "?model=nobody", json=INPUTS)
    assert (answer.status_code, error(answer)[1]) == (404, "validation")


async def test_a_body_with_a_prompt_is_still_native(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/generate", json={"prompt": "a b"})).json()
    assert (answer["text"], answer["model"]) == ("ab", "small")
    wrong = (await client.post("/generate", json={"prompt": "a", "parameters": {}})).json()
    assert wrong["error"]["param"] == "parameters"


async def test_the_root_is_the_page_and_the_route(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    wrong = await client.put("/")
    assert (wrong.status_code, set(wrong.headers["allow"].split(", "))) == (405, {"GET", "HEAD", "POST"})


async def test_info_is_what_is_configured_and_what_the_model_said(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    assert (await client.get("/info")).json() == {
        "model_id": "small",
        "model_sha": None,
        "model_dtype": None,
        "model_device_type": "cpu",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 64 + 8,
        "max_best_of": 16,
        "max_stop_sequences": 16,
        "max_input_tokens": 2047,
        "max_total_tokens": 2048,
        "max_client_batch_size": 50,
        "router": "serve_app",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    assert (await client.get("/info?model=org/large")).json()["model_id"] == "org/large"
    assert (await client.get("/info?model=nobody")).status_code == 404


@pytest.mark.parametrize("state", [state for state in ModelState if state is not ModelState.READY])
async def test_info_wakes_nobody(client: httpx.AsyncClient, gateway: ScriptedGateway, state: ModelState) -> None:
    gateway.states = [ModelStatus("small", state)]
    answer = (await client.get("/info")).json()
    assert (answer["max_input_tokens"], answer["max_total_tokens"], gateway.questions) == (None, None, [])
    gateway.states = [ModelStatus("small", ModelState.READY)]
    gateway.answers[GetModelInfo] = NotReady("it has just gone")
    assert (await client.get("/info")).json()["max_total_tokens"] is None
    gateway.answers[GetModelInfo] = ModelInfo(99, 300, frozenset())
    assert (await client.get("/info")).json()["max_total_tokens"] == 99
    gateway.states = [ModelStatus("small", state)]
    assert (await client.get("/info")).json()["max_total_tokens"] == 99, "it was said once"


async def test_info_tells_what_is_pinned() -> None:
    config = app_config()
    sha, scaled = "0e9e39f249a16976918f6564b8830bc894c89659", {"max_replicas": 3, "min_replicas": 1}
    changes: list[tuple[dict[str, Any], dict[str, object]]] = [
        (
            {"revision": sha, "dtype": "bfloat16", "device": "cpu"},
            {"model_sha": sha, "model_dtype": "torch.bfloat16", "model_device_type": "cpu"},
        ),
        (
            {"revision": "main", "resources": {"num_gpus": 0.5}},
            {"model_sha": None, "model_dtype": None, "model_device_type": "cuda"},
        ),
        (
            {"deployment": {"max_ongoing_requests": 32, "max_queued_requests": 5, "autoscaling": scaled}},
            {"max_concurrent_requests": 101},
        ),
    ]
    for fields, expected in changes:
        model = type(config.models[0]).model_validate(config.models[0].model_dump() | fields)
        app = create_app(ScriptedGateway(), config.model_copy(update={"models": (model,)}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = (await client.get("/info")).json()
        assert {name: answer[name] for name in expected} == expected


NAMES = st.sampled_from([*TgiBody.names(), *Parameters.names(), *GrammarField.names(), "schema", "name"])
FIELDS = st.dictionaries(NAMES | CHARACTERS, DOCUMENTS, max_size=3)


def is_readable(text: str) -> bool:
    """Else nobody knows which dialect it is."""
    try:
        parse_document(text.encode())
    except InvalidRequest:
        return False
    return True


def is_answered(answer: httpx.Response, gateway: ScriptedGateway) -> bool:
    """With success and nothing refused, or with one whole error that was counted once."""
    counted = len(gateway.refusals)
    if answer.status_code == 200:
        return counted == 0
    return answer.status_code in (404, 422) and error(answer)[1] == "validation" and counted == 1


@anything
@given(document=DOCUMENTS | FIELDS)
async def test_any_document_is_answered(client: httpx.AsyncClient, gateway: ScriptedGateway, document: object) -> None:
    gateway.refusals.clear()
    assert is_answered(await client.post("/", content=json.dumps(document)), gateway)


@anything
@given(path=st.sampled_from(["/generate", "/generate_stream", "/"]), parameters=FIELDS, grammar=FIELDS, more=FIELDS)
async def test_any_near_miss_is_answered(
    client: httpx.AsyncClient,
    gateway: ScriptedGateway,
    path: str,
    parameters: dict[str, object],
    grammar: dict[str, object],
    more: dict[str, object],
) -> None:
    gateway.refusals.clear()
    shape = {"grammar": {"type": "json", **grammar}} if grammar else {}
    body = json.dumps(more | INPUTS | {"parameters": parameters | shape})
    assume(is_readable(body))
    assert is_answered(await client.post(path, content=body), gateway)
