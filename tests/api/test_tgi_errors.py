"""Errors in Text Generation Inference's dialect."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import assume, given, strategies as st

from serve_app.api.app import create_app
from serve_app.api.body import parse_document
from serve_app.api.tgi.schema import GrammarField, Parameters, TgiBody
from serve_app.core.queries import GetModelInfo
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    QueueFull,
    ServeAppError,
)

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config, chunk, events_of, tgi_error_of
from .test_bodies import CHARACTERS, DOCUMENTS, anything
from .test_tgi import INPUTS, SCHEMA, WITH_PREFILL, every_path, every_stream, post

INVALID = [
    ({"max_new_tokens": 0}, "Field 'parameters.max_new_tokens' should be greater"),
    ({"temperature": 0}, "Field 'parameters.temperature' should be greater than 0"),
    ({"temperature": "1"}, "Field 'parameters.temperature' should be a valid number"),
    ({"top_k": 0}, "Field 'parameters.top_k' should be greater"),
    ({"top_p": 1.0}, "Field 'parameters.top_p' should be less than 1"),
    ({"top_p": 0.0}, "Field 'parameters.top_p' should be greater than 0"),
    ({"typical_p": 0.9}, "Field 'parameters.typical_p' asks for typical sampling"),
    ({"repetition_penalty": 0}, "Field 'parameters.repetition_penalty' should be greater than 0"),
    ({"frequency_penalty": 3}, "Field 'parameters.frequency_penalty' should be less"),
    ({"seed": -1}, "Field 'parameters.seed' should be greater"),
    ({"stop": "a"}, "Field 'parameters.stop' should be a valid list"),
    ({"stop": [""]}, "Field 'parameters.stop[0]'"),
    ({"stop": ["a"] * 17}, "Field 'parameters.stop'"),
    ({"truncate": 0}, "Field 'parameters.truncate' should be greater"),
    ({"watermark": True}, "Field 'parameters.watermark' can only be null or false"),
    ({"adapter_id": "mine"}, "Field 'parameters.adapter_id' can only be null: name the adapter in the field model"),
    ({"decoder_input_details": 1}, "Field 'parameters.decoder_input_details' should be a valid boolean"),
    ({"best_of": 17, "do_sample": True}, "Field 'parameters.best_of' should be less"),
    ({"best_of": 0}, "Field 'parameters.best_of' should be greater"),
    ({"top_n_tokens": 21}, "Field 'parameters.top_n_tokens' should be less"),
    ({"max_tokens": 3}, "Unknown field 'parameters.max_tokens'. Did you mean 'max_new_tokens'?"),
    ({"grammar": {"type": "regex"}}, "Field 'parameters.grammar.value' is required"),
    ({"grammar": {"type": "regex", "value": ""}}, "Field 'parameters.grammar' should have a regular expression"),
    ({"grammar": {"type": "json", "value": "[1]"}}, "Field 'parameters.grammar' should have a JSON schema"),
    ({"grammar": {"type": "json", "value": "{"}}, "Field 'parameters.grammar' should have a JSON schema"),
    ({"grammar": {"type": "json", "value": "[" * 9000}}, "Field 'parameters.grammar' should have a JSON schema"),
    (
        {"grammar": {"type": "json_schema", "value": SCHEMA}},
        "Field 'parameters.grammar' should have an object with \"schema\"",
    ),
    (
        {"grammar": {"type": "json_schema", "value": {"schema": {}, "name": 1}}},
        "Field 'parameters.grammar' should have",
    ),
    ({"grammar": {"type": "lark", "value": "a"}}, "Field 'parameters.grammar.type' should be"),
    (
        {"grammar": {"type": "regex", "value": "a", "vlue": 1}},
        "Unknown field 'parameters.grammar.vlue'.",
    ),
]


@every_path
@pytest.mark.parametrize(("parameters", "expected"), INVALID, ids=lambda value: str(value)[:40])
async def test_an_error_names_the_wrong_parameter(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    parameters: dict[str, Any],
    expected: str,
) -> None:
    answer = await post(client, path, parameters)
    assert answer.status_code == 422
    message, kind = tgi_error_of(answer)
    assert (message.startswith(expected), kind) == (True, "validation"), message
    assert (engine.requests, len(telemetry.errors)) == ([], 1)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/generate", {"inputs": ""}, "Field 'inputs'"),
        ("/generate", {"inputs": ["a"]}, "Field 'inputs' should be a valid string"),
        ("/generate", {**INPUTS, "prompt": "a"}, "Unknown field 'prompt'."),
        ("/generate", {**INPUTS, "stream": True}, "Send stream: true to /generate_stream"),
        ("/generate_stream", {**INPUTS, "stream": False}, "Send stream: false to /generate"),
        ("/generate", {**INPUTS, "parameters": []}, "Field 'parameters' should be an object"),
        ("/", {}, "Field 'inputs' is required."),
        ("/", [], "The body should be a JSON object."),
        ("/generate_stream", WITH_PREFILL, "Field 'parameters.decoder_input_details' is not available in a stream."),
        (
            "/",
            {**WITH_PREFILL, "stream": True},
            "Field 'parameters.decoder_input_details' is not available in a stream.",
        ),
        ("/generate", {**INPUTS, "parameters": {"best_of": 2}}, "Field 'parameters.best_of' is 2, but greedy answers"),
        (
            "/generate_stream",
            {**INPUTS, "parameters": {"best_of": 2, "top_k": 4}},
            "Field 'parameters.best_of' is 2, and the best answer",
        ),
        (
            "/",
            {**INPUTS, "stream": True, "parameters": {"best_of": 2, "top_k": 4}},
            "Field 'parameters.best_of' is 2, and the best answer",
        ),
    ],
)
async def test_a_wrong_body_is_an_error_in_tgi_form(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: object, expected: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 422
    message, kind = tgi_error_of(answer)
    assert (message.startswith(expected), kind) == (True, "validation"), message
    assert engine.requests == []


async def test_an_unreadable_body_at_the_root_is_an_error_in_tgi_form(client: httpx.AsyncClient) -> None:
    answer = await client.post("/", content=b"{")
    assert (answer.status_code, tgi_error_of(answer)[1]) == (422, "validation")
    answer = await client.post("/", content=b"x" * 20_001)
    assert (answer.status_code, tgi_error_of(answer)[1]) == (413, "validation")
    assert "error_type" not in (await client.post("/generate", content=b"{")).json(), "the dialect is not known yet"


async def test_too_many_answers_are_refused(telemetry: ScriptedTelemetry) -> None:
    engine = ScriptedEngine()
    transport = httpx.ASGITransport(create_app(engine, telemetry, app_config(max_batch_items=3)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await post(client, "/generate", {"best_of": 4, "do_sample": True})
        assert (answer.status_code, "'parameters.best_of' is 4, above the limit of 3" in tgi_error_of(answer)[0]) == (
            422,
            True,
        )
        assert (await client.get("/info")).json()["max_best_of"] == 3
    assert engine.requests == []


ERRORS: list[tuple[ServeAppError, int, str]] = [
    (ModelNotFound("The model was removed."), 404, "validation"),
    (QueueFull("The queue is full.", retry_after_s=1.2), 429, "overloaded"),
    (NotReady("The model is being loaded.", retry_after_s=1.2), 503, "overloaded"),
    (DeadlineExceeded("The request was not finished after 600 s."), 504, "incomplete_generation"),
    (InternalError("The model failed."), 500, "generation"),
]
every_error = pytest.mark.parametrize(("failure", "status", "kind"), ERRORS, ids=[e.code for e, _, _ in ERRORS])


@every_path
@every_error
async def test_every_error_has_its_status_and_type(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    failure: ServeAppError,
    status: int,
    kind: str,
) -> None:
    engine.plays(failure)
    answer = await client.post(path, json=INPUTS)
    assert (answer.status_code, tgi_error_of(answer)) == (status, (failure.message, kind))
    assert answer.headers.get("retry-after") == ("2" if failure.retry_after_s else None)
    assert telemetry.errors == [(failure, "small")]


@every_stream
@every_error
async def test_an_error_during_a_stream_is_an_event(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    more: dict[str, object],
    failure: ServeAppError,
    status: int,
    kind: str,
) -> None:
    engine.plays(chunk(["a"], None), failure)
    *before, last = events_of((await post(client, path, {}, **more)).text)
    assert len(before) == 1
    assert last == {"error": failure.message, "error_type": kind}
    assert telemetry.errors == [(failure, "small")]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_an_error_of_the_query_for_special_tokens_fails_the_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    engine.results[GetModelInfo] = NotReady("The replica was lost.", retry_after_s=1)
    answer = await post(client, path, {"details": True})
    assert (answer.status_code, tgi_error_of(answer)) == (503, ("The replica was lost.", "overloaded"))
    assert engine.running == 0


async def test_an_answer_without_an_end_is_an_error_in_tgi_form(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["a"], None))
    answer = await client.post("/generate", json=INPUTS)
    assert (answer.status_code, tgi_error_of(answer)[1]) == (500, "generation")


async def test_an_unexpected_exception_is_an_error_in_tgi_form(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(RuntimeError("a secret"))
    answer = await client.post("/", json=INPUTS)
    message, kind = tgi_error_of(answer)
    assert (answer.status_code, kind) == (500, "generation")
    assert "secret" not in message


NAMES = st.sampled_from([*TgiBody.names(), *Parameters.names(), *GrammarField.names(), "schema", "name"])
FIELDS = st.dictionaries(NAMES | CHARACTERS, DOCUMENTS, max_size=3)


def is_readable(text: str) -> bool:
    """Whether the dialect of a body can be recognised."""
    try:
        parse_document(text.encode())
    except InvalidRequest:
        return False
    return True


def is_valid(answer: httpx.Response, telemetry: ScriptedTelemetry) -> bool:
    """Whether the answer is a success without errors, or one complete error that was counted once."""
    counted = len(telemetry.errors)
    if answer.status_code == 200:
        return counted == 0
    return answer.status_code in (404, 422) and tgi_error_of(answer)[1] == "validation" and counted == 1


@anything
@given(document=DOCUMENTS | FIELDS)
async def test_any_document_gets_an_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, document: object
) -> None:
    telemetry.errors.clear()
    assert is_valid(await client.post("/", content=json.dumps(document)), telemetry)


@anything
@given(path=st.sampled_from(["/generate", "/generate_stream", "/"]), parameters=FIELDS, grammar=FIELDS, more=FIELDS)
async def test_any_variation_of_a_valid_body_gets_an_answer(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    parameters: dict[str, object],
    grammar: dict[str, object],
    more: dict[str, object],
) -> None:
    telemetry.errors.clear()
    shape = {"grammar": {"type": "json", **grammar}} if grammar else {}
    body = json.dumps(more | INPUTS | {"parameters": parameters | shape})
    assume(is_readable(body))
    assert is_valid(await client.post(path, content=body), telemetry)
