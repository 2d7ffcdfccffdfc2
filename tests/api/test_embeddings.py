from __future__ import annotations

import logging
import struct
from base64 import b64decode
from typing import Any

import httpx
import httpx2
import openai
import pytest

from serve_app.api.app import create_app
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest, Prompt, TextPrompt, TokenPrompt
from serve_app.errors import PromptTooLong, QueueFull

from .scripted import ScriptedEngine, ScriptedTelemetry, Step, app_config, assert_invalid, error_of
from .toy import toy

PATH = "/v1/embeddings"


def vector(request: GenerationRequest) -> list[Step]:
    """The vector of the prompt's length and 1."""
    prompt = request.prompt
    size = len(prompt.text if isinstance(prompt, TextPrompt) else getattr(prompt, "token_ids", ()))
    return [Chunk((), size, 0.0, embedding=(float(size), 1.0))]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(script=vector)


async def embed(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    answer = await client.post(PATH, json=fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hi", [TextPrompt("hi")]),
        (["hi", "you"], [TextPrompt("hi"), TextPrompt("you")]),
        ([7, 8], [TokenPrompt((7, 8))]),
        ([[7, 8], [9]], [TokenPrompt((7, 8)), TokenPrompt((9,))]),
    ],
    ids=str,
)
async def test_each_input_has_a_vector_in_order(
    client: httpx.AsyncClient, engine: ScriptedEngine, given: object, prompts: list[Prompt]
) -> None:
    body = await embed(client, input=given, truncate_prompt_tokens=9, priority=-2)
    assert [request.prompt for request in engine.requests] == prompts
    assert all(request.embed and request.truncate_prompt_tokens == 9 for request in engine.requests)
    assert {request.priority for request in engine.requests} == {-2}
    assert len({request.id for request in engine.requests}) == len(prompts)
    sizes = [len(prompt.text if isinstance(prompt, TextPrompt) else prompt.token_ids) for prompt in prompts]  # type: ignore[union-attr]
    assert body == {
        "object": "list",
        "model": "small",
        "data": [{"object": "embedding", "index": i, "embedding": [n, 1.0]} for i, n in enumerate(sizes)],
        "usage": {"prompt_tokens": sum(sizes), "total_tokens": sum(sizes)},
    }


async def test_base64_holds_float32_values(client: httpx.AsyncClient) -> None:
    body = await embed(client, input="hello", encoding_format="base64", dimensions=2)
    assert struct.unpack("<2f", b64decode(body["data"][0]["embedding"])) == (5.0, 1.0)


async def test_a_model_without_embeddings_is_refused_with_the_remedy(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    answer = await client.post(PATH, json={"input": "hi", "model": "org/large"})
    assert answer.status_code == 404
    assert error_of(answer)["param"] == "model"
    assert "embeddings: true" in error_of(answer)["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["a", 1]}, "input[1]", "valid string"),
        ({"input": "a", "prompt": "a"}, "prompt", "Unknown field"),
        ({"input": "a", "dimensions": 3}, "dimensions", "have 2 dimensions. Send 2"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 for as many"),
        ({"input": "a", "user": "u" * 129}, "user", "at most 128"),
        ({"input": ["a"] * 51}, "input", "at most 50"),
    ],
)
async def test_an_error_names_the_invalid_field(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, expected: str
) -> None:
    answer = await client.post(PATH, json=fields)
    assert_invalid(answer)
    assert error_of(answer)["param"] == param
    assert expected in error_of(answer)["message"]


async def test_an_error_of_the_prompt_names_the_field_input(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(PromptTooLong("too long", param="prompt"))
    assert error_of(await client.post(PATH, json={"input": "a"}))["param"] == "input"
    engine.plays(QueueFull("full", retry_after_s=3))
    answer = await client.post(PATH, json={"input": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


async def test_at_most_32_inputs_run_at_the_same_time(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [0.01, *vector(request)]
    await embed(client, input=["a"] * 50)
    assert 1 < engine.max_running <= 32


async def test_the_user_of_embeddings_is_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serve_app"):
        await embed(client, input="a", user="me")
    assert [record.getMessage() for record in caplog.records if "'me'" in record.getMessage()]


async def test_the_openai_client_embeds(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    """The client requests base64 and returns numbers."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(engine, telemetry, app_config())))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", http_client=http) as client:
        answer = await client.embeddings.create(model="small", input=["hi", "you"])
    assert [one.embedding for one in answer.data] == [[2.0, 1.0], [3.0, 1.0]]
    assert answer.usage.prompt_tokens == 5


async def test_the_native_engine_embeds() -> None:
    """More inputs than the engine has slots."""
    async with toy() as (client, _):
        body = await embed(client, input=["a" * 30, "b" * 9, "ab" * 20, "`", "a"])
        found = [one["embedding"] for one in body["data"]]
        assert found[2] == pytest.approx([0, 0.5**0.5, 0.5**0.5, 0])
        assert found[:2] + found[3:] == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
        assert body["usage"] == {"prompt_tokens": 81, "total_tokens": 81}
        answer = await client.post(PATH, json={"input": "a" * 64})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "input")
