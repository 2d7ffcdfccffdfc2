"""The endpoints /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve_app.core.queries import Detokenize, GetModelInfo, GetTokenizerInfo, Query, Tokenize
from serve_app.core.requests import ChatMessage, ChatPrompt, TextPrompt
from serve_app.errors import InvalidRequest, NotReady

from .scripted import ScriptedEngine, ScriptedTelemetry, error_of

HI = {"role": "user", "content": "hi"}
CHAT = ChatPrompt((ChatMessage("user", "hi"),))


async def test_tokens_of_a_prompt(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    answer = await client.post("/tokenize", json={"prompt": "some"})
    assert answer.json() == {"count": 2, "max_model_len": 2048, "tokens": [5, 6], "token_strs": None}
    assert engine.queries == [("small", Tokenize(TextPrompt("some"))), ("small", GetModelInfo())]
    answer = await client.post("/tokenize", json={"prompt": "some", "return_token_strs": True, "model": "org/large"})
    assert answer.json()["token_strs"] == ["so", "me"]
    assert [model for model, _ in engine.queries[2:]] == ["org/large"] * 2
    assert (engine.requests, telemetry.errors) == ([], [])


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"prompt": ""}, Tokenize(TextPrompt(""))),
        ({"prompt": "a", "add_special_tokens": False}, Tokenize(TextPrompt("a"), special_tokens=False)),
        ({"prompt": "a", "add_special_tokens": True}, Tokenize(TextPrompt("a"), special_tokens=True)),
        ({"messages": [HI]}, Tokenize(CHAT)),
        ({"messages": [HI], "prompt": None}, Tokenize(CHAT)),
        ({"messages": [HI], "add_special_tokens": False}, Tokenize(CHAT, special_tokens=False)),
        ({"inputs": "a"}, Tokenize(TextPrompt("a"))),
    ],
    ids=str,
)
async def test_queries_of_tokenize(
    client: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], query: Query[Any]
) -> None:
    assert (await client.post("/tokenize", json=body)).status_code == 200
    assert engine.queries[0] == ("small", query)


async def test_tgi_form_has_the_place_of_each_token(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await client.post("/tokenize", json={"inputs": "some", "model": "org/large"})
    assert answer.json() == [
        {"id": 5, "text": "so", "start": 0, "stop": 2},
        {"id": 6, "text": "me", "start": 2, "stop": 4},
    ]
    assert [model for model, _ in engine.queries] == ["org/large"]


async def test_detokenize_returns_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await client.post("/detokenize", json={"tokens": [5, 6]})
    assert answer.json() == {"prompt": "some"}
    assert engine.queries == [("small", Detokenize((5, 6)))]
    await client.post("/detokenize", json={"tokens": [5], "model": "org/large"})
    assert engine.queries[1:] == [("org/large", Detokenize((5,)))]


async def test_facts_of_a_tokenizer(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await client.get("/tokenizer_info", params={"model": "org/large"})
    assert answer.json() == {
        "tokenizer_class": "Scripted",
        "bos_token": None,
        "eos_token": "<end>",
        "pad_token": None,
        "unk_token": None,
        "model_max_length": 2048,
        "chat_template": "{{ 1 }}",
        "added_tokens_decoder": {
            "2": {
                "content": "<end>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        },
    }
    assert engine.queries == [("org/large", GetTokenizerInfo()), ("org/large", GetModelInfo())]
    assert (await client.get("/tokenizer_info")).status_code == 200
    assert engine.queries[2:] == [("small", GetTokenizerInfo()), ("small", GetModelInfo())]
    unknown = await client.get("/tokenizer_info", params={"model": "other"})
    assert (unknown.status_code, error_of(unknown)["param"]) == (404, "model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [HI]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": [HI], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/tokenize", {"inputs": 1}, "inputs"),
        ("/tokenize", {"inputs": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
    ids=str,
)
async def test_an_error_names_the_wrong_field(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    body: dict[str, Any],
    param: str,
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 422
    assert error_of(answer)["param"] == param
    assert (engine.queries, len(telemetry.errors)) == ([], 1)


async def test_an_unknown_token_id_is_an_error_of_the_field_tokens(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.results[Detokenize] = InvalidRequest("Token id 900 is outside of 0 to 299.", param="prompt")
    error = error_of(await client.post("/detokenize", json={"tokens": [900]}))
    assert (error["param"], error["message"]) == ("tokens", "Token id 900 is outside of 0 to 299.")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "a"}), ("/tokenize", {"inputs": "a"}), ("/detokenize", {"tokens": [1]})],
)
async def test_an_error_of_a_query_has_its_status(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, body: dict[str, Any]
) -> None:
    failure = NotReady("The model is being loaded.", retry_after_s=2)
    engine.results |= {Tokenize: failure, Detokenize: failure}
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.headers["retry-after"], error_of(answer)["code"]) == (503, "2", "not_ready")
    assert telemetry.errors == [(failure, "small")]
    assert (await client.post(path, json=body | {"model": "unknown"})).status_code == 404
