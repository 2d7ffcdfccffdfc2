"""Text to tokens and back, over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve_app.core.queries import Detokenize, GetModelInfo, Query, Tokenize
from serve_app.core.requests import ChatMessage, ChatPrompt, TextPrompt
from serve_app.errors import InvalidRequest, NotReady

from .scripted import ScriptedGateway, told

HI = {"role": "user", "content": "hi"}
CHAT = ChatPrompt((ChatMessage("user", "hi"),))


async def test_the_tokens_of_a_prompt(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/tokenize", json={"prompt": "some"})
    assert answer.json() == {"count": 2, "max_model_len": 2048, "tokens": [5, 6], "token_strs": None}
    assert gateway.questions == [("small", Tokenize(TextPrompt("some"))), ("small", GetModelInfo())]
    answer = await client.post("/tokenize", json={"prompt": "some", "return_token_strs": True, "model": "org/large"})
    assert answer.json()["token_strs"] == ["so", "me"]
    assert [model for model, _ in gateway.questions[2:]] == ["org/large"] * 2
    assert (gateway.requests, gateway.refusals) == ([], [])


@pytest.mark.parametrize(
    ("body", "question"),
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
async def test_what_is_asked_of_the_model(
    client: httpx.AsyncClient, gateway: ScriptedGateway, body: dict[str, Any], question: Query[Any]
) -> None:
    assert (await client.post("/tokenize", json=body)).status_code == 200
    assert gateway.questions[0] == ("small", question)


async def test_tgis_form_tells_where_each_token_lies(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/tokenize", json={"inputs": "some", "model": "org/large"})
    assert answer.json() == [
        {"id": 5, "text": "so", "start": 0, "stop": 2},
        {"id": 6, "text": "me", "start": 2, "stop": 4},
    ]
    assert [model for model, _ in gateway.questions] == ["org/large"]


async def test_tokens_become_text(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/detokenize", json={"tokens": [5, 6]})
    assert answer.json() == {"prompt": "some"}
    assert gateway.questions == [("small", Detokenize((5, 6)))]
    await client.post("/detokenize", json={"tokens": [5], "model": "org/large"})
    assert gateway.questions[1:] == [("org/large", Detokenize((5,)))]


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
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 422
    assert told(answer)["param"] == param
    assert (gateway.questions, len(gateway.refusals)) == ([], 1)


async def test_a_token_that_the_model_does_not_know_is_named_as_the_body_calls_it(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    gateway.answers[Detokenize] = InvalidRequest("token id 900 is outside 0 to 299", param="prompt")
    error = told(await client.post("/detokenize", json={"tokens": [900]}))
    assert (error["param"], error["message"]) == ("tokens", "token id 900 is outside 0 to 299")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "a"}), ("/tokenize", {"inputs": "a"}), ("/detokenize", {"tokens": [1]})],
)
async def test_a_model_that_cannot_answer_keeps_its_status(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, Any]
) -> None:
    failure = NotReady("it is being loaded", retry_after_s=2)
    gateway.answers |= {Tokenize: failure, Detokenize: failure}
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.headers["retry-after"], told(answer)["code"]) == (503, "2", "not_ready")
    assert gateway.refusals == [(failure, "small")]
    assert (await client.post(path, json=body | {"model": "nobody"})).status_code == 404
