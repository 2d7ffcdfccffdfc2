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

from .scripted import ScriptedGateway, Step, app_config, told
from .toy import toy

PATH = "/v1/embeddings"


def vector(request: GenerationRequest) -> list[Step]:
    """The length of the prompt, and one."""
    prompt = request.prompt
    size = len(prompt.text if isinstance(prompt, TextPrompt) else getattr(prompt, "token_ids", ()))
    return [Chunk((), size, 0.0, embedding=(float(size), 1.0))]


@pytest.fixture
def gateway() -> ScriptedGateway:
    return ScriptedGateway(script=vector)


async def asked(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
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
async def test_every_input_has_its_vector_in_order(
    client: httpx.AsyncClient, gateway: ScriptedGateway, given: object, prompts: list[Prompt]
) -> None:
    body = await asked(client, input=given, truncate_prompt_tokens=9, priority=-2)
    assert [request.prompt for request in gateway.requests] == prompts
    assert all(request.embed and request.truncate_prompt_tokens == 9 for request in gateway.requests)
    assert {request.priority for request in gateway.requests} == {-2}
    assert len({request.id for request in gateway.requests}) == len(prompts)
    sizes = [len(prompt.text if isinstance(prompt, TextPrompt) else prompt.token_ids) for prompt in prompts]  # type: ignore[union-attr]
    assert body == {
        "object": "list",
        "model": "small",
        "data": [{"object": "embedding", "index": i, "embedding": [n, 1.0]} for i, n in enumerate(sizes)],
        "usage": {"prompt_tokens": sum(sizes), "total_tokens": sum(sizes)},
    }


async def test_base64_is_float32(client: httpx.AsyncClient) -> None:
    body = await asked(client, input="hello", encoding_format="base64", dimensions=2)
    assert struct.unpack("<2f", b64decode(body["data"][0]["embedding"])) == (5.0, 1.0)


async def test_a_model_that_is_not_switched_on_says_what_switches_it_on(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    answer = await client.post(PATH, json={"input": "hi", "model": "org/large"})
    assert answer.status_code == 404
    assert told(answer)["param"] == "model"
    assert "embeddings: true" in told(answer)["message"]
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["a", 1]}, "input[1]", "valid string"),
        ({"input": "a", "prompt": "a"}, "prompt", "not a field"),
        ({"input": "a", "dimensions": 3}, "dimensions", "have 2; send 2"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 for as many"),
        ({"input": "a", "user": "u" * 129}, "user", "at most 128"),
        ({"input": ["a"] * 51}, "input", "at most 50"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = await client.post(PATH, json=fields)
    assert answer.status_code == 422
    assert told(answer)["param"] == param
    assert says in told(answer)["message"]


async def test_a_prompt_that_the_model_refuses_is_called_input(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    gateway.plays(PromptTooLong("too long", param="prompt"))
    assert told(await client.post(PATH, json={"input": "a"}))["param"] == "input"
    gateway.plays(QueueFull("full", retry_after_s=3))
    answer = await client.post(PATH, json={"input": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


async def test_many_run_side_by_side_within_bounds(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.script = lambda request: [0.01, *vector(request)]
    await asked(client, input=["a"] * 50)
    assert 1 < gateway.most_running <= 32


async def test_who_it_is_for_is_written_to_the_log(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serve_app"):
        await asked(client, input="a", user="me")
    assert [record.getMessage() for record in caplog.records if "'me'" in record.getMessage()]


async def test_the_official_client_embeds(gateway: ScriptedGateway) -> None:
    """It asks for base64 and gives floats."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(gateway, app_config())))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", http_client=http) as client:
        answer = await client.embeddings.create(model="small", input=["hi", "you"])
    assert [one.embedding for one in answer.data] == [[2.0, 1.0], [3.0, 1.0]]
    assert answer.usage.prompt_tokens == 5


async def test_the_toy_counts_remainders() -> None:
    """In chunks, in more of them than there are slots."""
    async with toy() as (client, _):
        body = await asked(client, input=["a" * 30, "b" * 9, "ab" * 20, "`", "a"])
        found = [one["embedding"] for one in body["data"]]
        assert found[2] == pytest.approx([0, 0.5**0.5, 0.5**0.5, 0])
        assert found[:2] + found[3:] == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
        assert body["usage"] == {"prompt_tokens": 81, "total_tokens": 81}
        answer = await client.post(PATH, json={"input": "a" * 64})
        assert (answer.status_code, told(answer)["param"]) == (422, "input")
