"""Requests of client libraries with mutated fields: never a status of 500 or above, a hang or an exception in the log.

tests/clients/requests has what the libraries send; `python -m tests.clients.record` recorded it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from tests.api.scripted import ScriptedEngine, ScriptedTelemetry, Step, app_config
from tests.api.test_prompt_details import with_details

from .record import REQUESTS

SEED = 20_261
MODEL = "smollm2-135m"
# Values of other types, the bounds of numbers, and values that no client sends.
GARBAGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**64, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf"), "", " ", "a",
    "\0", "\ud800", "🦕" * 3, "null", "[1, 2]", "<|im_end|>", [], [[]], [None], [1, "a", {}], {}, {"": ""}, {"a": None},
    {"type": "text"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"type": "json_schema"}, {"role": "user"},
]  # fmt: skip
# Stands for lists within lists, deeper than Python's encoder goes.
DEEP = "<deep>"
# The fields that bound an answer. The model writes until the end of its context without them.
LENGTHS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


def recorded() -> list[tuple[str, Any]]:
    requests = [request for file in sorted(REQUESTS.glob("*.json")) for request in json.loads(file.read_text())]
    return [(request["path"], request["body"]) for request in requests]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each member of the value and of the values in it, as its container and its name or number."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        yield value, name
        yield from places(member)


def garbage(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(GARBAGE))


def huge(rng: random.Random) -> Any:
    """A long text, a long list, a large object, a deep value, or a large number."""
    size = rng.choice([300, 3_000, 30_000])
    return rng.choice(["x" * size, [0] * size, {f"k{n}": n for n in range(size // 10)}, DEEP, 10**300])


def mutate(rng: random.Random, body: Any) -> Any:
    """A copy of the body in which one to three members are dropped, replaced, added, swapped or doubled."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        found = list(places(body))
        if not found:
            return garbage(rng)
        container, name = rng.choice(found)
        other_container, other = rng.choice(found)
        match rng.randrange(6):
            case 0:
                del container[name]
            case 1:
                container[name] = garbage(rng)
            case 2:
                container[name] = huge(rng)
            case 3:
                container[name] = copy.deepcopy(other_container[other])
            case 4:
                container[name] = [container[name], garbage(rng)]
            case _:
                container[name] = {"type": container[name], str(other): garbage(rng)}
    return body


def mutated(count: int) -> Iterator[tuple[str, Any, Any]]:
    """The path, the recorded body and its mutation. The first ones of a larger `count` are the same."""
    rng = random.Random(SEED)
    requests = recorded()
    for _ in range(count):
        path, body = rng.choice(requests)
        yield path, body, mutate(rng, body)


def encode(body: Any) -> bytes:
    """JSON, and what Python's parser takes beyond it: NaN, Infinity and halves of surrogate pairs."""
    return json.dumps(body).replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).encode()


def script(request: GenerationRequest) -> list[Step]:
    """A vector for an embedding; otherwise an answer with everything that a request can ask for."""
    if request.embed:
        return [Chunk((), 2, 0.0, embedding=(0.6, 0.8))]
    return [*with_details(request)]


async def post(client: httpx.AsyncClient, path: str, content: bytes, seconds: float) -> httpx.Response:
    try:
        async with asyncio.timeout(seconds):
            return await client.post(path, content=content)
    except TimeoutError:
        pytest.fail(f"no answer after {seconds} s: POST {path} {content[:2000]!r}")


def check(answer: httpx.Response, path: str, content: bytes) -> None:
    """A wrong request is refused; an error within a stream is an error of the request too."""
    failed = answer.status_code >= 500 or "internal_error" in answer.text or "server_error" in answer.text
    assert not failed, f"{answer.status_code} {answer.text[:500]}: POST {path} {content[:2000]!r}"


async def fuzz(count: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    engine = ScriptedEngine(script=script)
    transport = httpx.ASGITransport(create_app(engine, ScriptedTelemetry(), app_config()))
    statuses = set()
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, _, body in mutated(count):
            content = encode(body).replace(f'"{MODEL}"'.encode(), b'"small"')
            answer = await post(client, path, content, seconds=10)
            check(answer, path, content)
            statuses.add(answer.status_code)
    assert {200, 400, 404} <= statuses, "the mutations are too weak or too strong"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_recorded_requests_come_from_the_client_libraries() -> None:
    paths = {path for path, _ in recorded()}
    assert paths >= {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/"}
    assert "api_key" not in json.dumps(recorded())


@pytest.mark.slow
async def test_2000_mutated_requests(caplog: pytest.LogCaptureFixture) -> None:
    await fuzz(2_000, caplog)


@pytest.mark.long
async def test_10000_mutated_requests(caplog: pytest.LogCaptureFixture) -> None:
    await fuzz(10_000, caplog)


@pytest.mark.long
@pytest.mark.system
@pytest.mark.timeout(1200)
async def test_300_mutated_requests_to_the_service(url: str) -> None:
    """The answers are short: the field that bounds them is not mutated."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        for path, _, body in mutated(300):
            if isinstance(body, dict) and (field := LENGTHS.get(path)):
                body |= {field: 8}
            content = encode(body)
            check(await post(client, path, content, seconds=120), path, content)
        assert (await client.get("/ready")).status_code == 200
