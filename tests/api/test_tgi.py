"""Text Generation Inference's dialect: bodies, answers and errors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from huggingface_hub import TextGenerationOutput, TextGenerationStreamOutput

from serve_app.core.events import Chunk, FinishReason, Logprobs, PromptDetails, TextToken, TokenEvent, TokenLogprob
from serve_app.core.queries import GetModelInfo
from serve_app.core.requests import GenerationRequest, Grammar, SamplingParams, TextPrompt

from .scripted import (
    BEAT,
    Connection,
    ScriptedEngine,
    ScriptedTelemetry,
    chunk,
    events_of,
    serve,
    tgi_error_of,
    with_heartbeats,
)
from .toy import toy

INPUTS = {"inputs": "a b c"}
WITH_PREFILL = {**INPUTS, "parameters": {"decoder_input_details": True}}
END = 2  # the only special token of the scripted model
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# How each path expected whether it streams.
WHOLE = ["/generate", "/"]
STREAMS: list[tuple[str, dict[str, object]]] = [("/generate_stream", {}), ("/", {"stream": True})]
every_path = pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
every_stream = pytest.mark.parametrize(("path", "more"), STREAMS)


def event(
    id: int, text: str, finish: FinishReason | None = None, logprob: float = -0.5, by: str | int | None = None
) -> TokenEvent:
    logprobs = Logprobs(TokenLogprob(id, f"<{id}>", logprob), (TokenLogprob(END, "<2>", -0.25),))
    return TokenEvent(id, text, 0.1, finish, logprobs, by)


def chunk_of(*events: TokenEvent) -> Chunk:
    return Chunk(events, prompt_tokens=3, queue_s=0.0)


async def post(client: httpx.AsyncClient, path: str, parameters: dict[str, Any], **more: object) -> httpx.Response:
    return await client.post(path, json={**INPUTS, "parameters": parameters, **more})


async def whole(client: httpx.AsyncClient, path: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The answer, which at / is the only item of a list."""
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
    found = events_of(answer.text)
    for event in found:
        TextGenerationStreamOutput.parse_obj_as_instance(event)
    return found


async def params_of(client: httpx.AsyncClient, engine: ScriptedEngine, **parameters: Any) -> SamplingParams:
    await whole(client, "/generate", parameters)
    return engine.requests[-1].params


@pytest.mark.parametrize("path", WHOLE)
async def test_a_whole_answer_is_text(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    assert await whole(client, path, {}) == {"generated_text": "abc"}
    (request,) = engine.requests
    assert (request.model, request.prompt, request.truncate_prompt_tokens) == ("small", TextPrompt("a b c"), None)
    assert request.params == SamplingParams(
        max_tokens=100, temperature=0, top_p=0.9, include_stop_str_in_output=True, logprobs=None
    )
    assert engine.queries == [], "a text needs no special token ids"
    assert [request.wake_wait_s for request in engine.requests] == [30.0]


@pytest.mark.parametrize("path", WHOLE)
async def test_details_list_every_token(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    engine.plays(chunk_of(event(7, "a"), event(8, "")), chunk_of(event(9, "é"), event(END, "", FinishReason.STOP)))
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
async def test_a_stream_has_an_event_for_each_token(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, more: dict[str, object]
) -> None:
    engine.plays(chunk_of(event(7, "a")), chunk_of(event(8, "b"), event(END, "", FinishReason.STOP)))
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
    assert engine.requests[0].params.logprobs == 0
    assert [request.wake_wait_s for request in engine.requests] == [None]


@every_stream
async def test_a_stream_has_details_only_if_requested(
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
async def test_finish_reasons_have_tgi_names(
    client: httpx.AsyncClient, engine: ScriptedEngine, finish: FinishReason, by: str | int | None, reason: str
) -> None:
    engine.plays(chunk_of(event(7, "a"), event(8, "b", finish, by=by)))
    for path in WHOLE:
        assert (await whole(client, path, {"details": True}))["details"]["finish_reason"] == reason
    for path, more in STREAMS:
        last = (await stream(client, path, {"details": True}, **more))[-1]
        assert last["details"]["finish_reason"] == reason


async def test_special_token_ids_are_queried_once(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for _ in range(2):
        await whole(client, "/generate", {"details": True})
        await stream(client, "/generate_stream", {})
    assert engine.queries == [("small", GetModelInfo())]


async def test_every_parameter_reaches_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
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
    assert await params_of(client, engine, **parameters) == SamplingParams(
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
    assert engine.requests[-1].truncate_prompt_tokens == 7


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
async def test_which_parameters_sample(
    client: httpx.AsyncClient, engine: ScriptedEngine, parameters: dict[str, Any], temperature: float
) -> None:
    """The default temperature of the scripted model is 0.2. A sampled answer has a seed, which the details report."""
    params = await params_of(client, engine, **parameters)
    assert params.temperature == temperature
    assert (params.seed is None) == (temperature == 0)
    seed = (await whole(client, "/generate", {**parameters, "details": True}))["details"]["seed"]
    assert seed == engine.requests[-1].params.seed


async def test_do_sample_samples_a_model_that_is_greedy_by_default(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await client.post("/generate", json={**INPUTS, "model": "org/large", "parameters": {"do_sample": True}})
    assert engine.requests[-1].params.temperature == 1.0


async def test_a_sampled_answer_without_a_seed_gets_a_random_one(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    seeds = {(await params_of(client, engine, do_sample=True)).seed for _ in range(5)}
    assert len(seeds) == 5


async def test_a_greedy_answer_has_no_seed(client: httpx.AsyncClient) -> None:
    assert (await whole(client, "/generate", {"details": True, "seed": 5}))["details"]["seed"] is None


@pytest.mark.parametrize("full", [True, False])
async def test_return_full_text_begins_with_the_prompt(client: httpx.AsyncClient, full: bool) -> None:
    text = "a b cabc" if full else "abc"
    for path in WHOLE:
        assert (await whole(client, path, {"return_full_text": full}))["generated_text"] == text
    for path, more in STREAMS:
        first, *_, last = await stream(client, path, {"return_full_text": full}, **more)
        assert (first["token"]["text"], last["generated_text"]) == ("a", text)


async def test_top_tokens_of_each_token(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk_of(event(7, "a"), event(8, "b", FinishReason.LENGTH)))
    top = [{"id": END, "text": "<2>", "logprob": -0.25, "special": True}]
    details = (await whole(client, "/generate", {"details": True, "top_n_tokens": 1}))["details"]
    assert details["top_tokens"] == [top, top]
    assert engine.requests[-1].params.logprobs == 1
    found = await stream(client, "/generate_stream", {"top_n_tokens": 1})
    assert [event["top_tokens"] for event in found] == [top, top]
    assert "top_tokens" not in (await stream(client, "/generate_stream", {"top_n_tokens": 0}))[0]


@pytest.mark.parametrize(
    ("field", "grammar"),
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
async def test_a_grammar_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, field: object, grammar: Grammar
) -> None:
    assert (await params_of(client, engine, grammar=field)).grammar == grammar


def by_number(request: GenerationRequest) -> Iterable[Chunk]:
    """Answer 1 has the highest mean log probability of a token, answer 0 the highest sum."""
    logprob, length = [(-0.6, 1), (-0.5, 2), (-0.9, 3)][request.index]
    events = [event(7, str(request.index), logprob=logprob) for _ in range(length - 1)]
    return [chunk_of(*events, event(8, str(request.index), FinishReason.LENGTH, logprob))]


@pytest.mark.parametrize("path", WHOLE)
async def test_best_of_returns_the_most_likely_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    engine.script = by_number
    parameters = {"best_of": 3, "do_sample": True, "seed": 10}
    assert await whole(client, path, parameters) == {"generated_text": "11"}
    assert [request.index for request in engine.requests] == [0, 1, 2]
    (group,) = {request.group for request in engine.requests}
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


async def test_one_answer_has_no_best_of_sequences(client: httpx.AsyncClient) -> None:
    details = (await whole(client, "/generate", {"best_of": 1, "details": True}))["details"]
    assert "best_of_sequences" not in details


def with_prompt(request: GenerationRequest) -> Iterable[Chunk]:
    """Reports the requested details of the prompt, whose third token has probability 0."""
    tokens = (TextToken(END, "<2>", 0, 0), TextToken(20, "a b", 0, 3), TextToken(30, " c", 3, 5))
    logprobs = (Logprobs(TokenLogprob(20, "a b", -0.7), ()), Logprobs(TokenLogprob(30, " c", float("-inf")), ()))
    known = request.params.prompt_logprobs is not None
    prompt = PromptDetails(tokens if request.prompt_details else (), "a b c", logprobs if known else ())
    details = prompt if known or request.prompt_details else None
    return [replace(one, prompt=details) for one in by_number(request)]


PREFILL = [
    {"id": END, "text": "<2>", "logprob": None},
    {"id": 20, "text": "a b", "logprob": -0.7},
    {"id": 30, "text": " c", "logprob": -9999.0},
]


@pytest.mark.parametrize("path", WHOLE)
@pytest.mark.parametrize("details", [{}, {"details": True}, {"details": False}], ids=str)
async def test_decoder_input_details_come_with_details(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, details: dict[str, bool]
) -> None:
    engine.script = with_prompt
    found = (await whole(client, path, {**details, "decoder_input_details": True}))["details"]
    assert found["prefill"] == PREFILL
    assert [token["id"] for token in found["tokens"]] == [8]
    (request,) = engine.requests
    assert (request.prompt_details, request.params.prompt_logprobs) == (True, 0)


async def test_best_of_requests_prompt_details_once(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = with_prompt
    parameters = {"best_of": 3, "do_sample": True, "decoder_input_details": True}
    details = (await whole(client, "/generate", parameters))["details"]
    assert [one["prefill"] for one in (details, *details["best_of_sequences"])] == [PREFILL] * 3
    assert [request.prompt_details for request in engine.requests] == [True, False, False]
    assert [request.params.prompt_logprobs for request in engine.requests] == [0, None, None]


@pytest.mark.parametrize("parameters", [{"details": True}, {"details": True, "decoder_input_details": False}], ids=str)
async def test_prefill_is_empty_by_default(
    client: httpx.AsyncClient, engine: ScriptedEngine, parameters: dict[str, bool]
) -> None:
    engine.script = with_prompt
    assert (await whole(client, "/generate", parameters))["details"]["prefill"] == []
    assert (engine.requests[0].prompt_details, engine.requests[0].params.prompt_logprobs) == (False, None)


async def test_the_native_engine_reports_a_truncated_prompt() -> None:
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


@with_heartbeats
async def test_a_silent_stream_has_heartbeats(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(BEAT, chunk(["a"]))
    text = (await client.post("/generate_stream", json=INPUTS)).text
    assert text.startswith(": queued\n\n")
    assert events_of(text)[-1]["generated_text"] == "a"


@pytest.mark.parametrize(("path", "more"), [*STREAMS, ("/generate", {}), ("/", {})])
async def test_a_disconnect_closes_the_generator(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, more: dict[str, object]
) -> None:
    engine.plays(chunk(["a"], None), None)
    connection = Connection(path, {**INPUTS, **more})
    call = serve(engine, telemetry, connection)
    await engine.reached.wait()
    connection.disconnect.set()
    await call
    assert (engine.running, engine.completed, len(engine.closed), telemetry.errors) == (0, 0, 1, [])


@pytest.mark.parametrize(
    ("query", "body", "model"),
    [("", {}, "small"), ("?model=org/large", {}, "org/large"), ("?model=org/large", {"model": "small"}, "small")],
)
@every_path
async def test_the_body_or_the_query_names_the_model(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, query: str, body: dict[str, object], model: str
) -> None:
    assert (await client.post(path + query, json={**INPUTS, **body})).status_code == 200
    assert engine.requests[-1].model == model
    answer = await client.post(path + "?model=unknown", json=INPUTS)
    assert (answer.status_code, tgi_error_of(answer)[1]) == (404, "validation")


async def test_a_body_with_a_prompt_is_native(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/generate", json={"prompt": "a b"})).json()
    assert (answer["text"], answer["model"]) == ("ab", "small")
    wrong = (await client.post("/generate", json={"prompt": "a", "parameters": {}})).json()
    assert wrong["error"]["param"] == "parameters"


async def test_the_root_serves_the_page_and_the_endpoint(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    wrong = await client.put("/")
    assert (wrong.status_code, set(wrong.headers["allow"].split(", "))) == (405, {"GET", "HEAD", "POST"})
