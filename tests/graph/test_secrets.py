"""Secrets of the service and of its clients are in no answer, metric, trace, log or output."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.graph.conftest import SECRETS, TracedService
from tests.graph.service import http_client

pytestmark = pytest.mark.ray

KEY = "hush-key-of-a-client"
HEADERS = [
    {"authorization": f"Bearer {KEY}"},
    {"x-api-key": KEY},
    {"cookie": f"session={KEY}"},
    {"proxy-authorization": f"Basic {KEY}"},
]


async def answers(client: httpx.AsyncClient) -> str:
    """Answers and errors of every kind to requests with the client's key."""
    body = {"model": "only", "prompt": "hi", "max_tokens": 2}
    bodies = [json.dumps(body | more) for more in ({}, {"temperature": 9}, {"model": "none"}, {"nothing": 1})]
    bodies += ["{", json.dumps(body | {"model": "faulty", "prompt": "bad"})]
    paths = ["/generate", "/generate_stream", "/v1/completions", "/v1/messages", "/nowhere"]
    gets = ["/metrics", "/info", "/version", "/load", "/ready", "/openapi.json", "/experiments", "/v1/models"]
    posted = [
        client.post(path, content=content, headers=headers, params={"api_key": KEY})
        for headers in HEADERS
        for content in bodies
        for path in paths
    ]
    got = [client.get(path, headers=headers) for headers in HEADERS for path in gets]
    return "".join(answer.text for answer in await asyncio.gather(*posted, *got))


async def test_no_secret_leaves_the_service(traced: TracedService) -> None:
    service = traced.service
    async with http_client(service) as client:
        text = await answers(client)
        await asyncio.sleep(2)  # spans are sent after 0.2 s, and processes report once a second
        text += (await client.get("/metrics")).text
    secrets = {KEY, *SECRETS.values(), service.environment["RAY_AUTH_TOKEN"]}
    files = [file for file in (service.folder / "ray/session_latest/logs").rglob("*") if file.is_file()]
    places = {"answers": text.encode(), "spans": bytes(traced.collector.raw), "output": service.output().encode()}
    places |= {str(file.relative_to(service.folder)): file.read_bytes() for file in files}
    assert len(text) > 10_000
    assert len(files) > 5
    assert traced.collector.raw
    found = [(place, secret) for place, content in places.items() for secret in secrets if secret.encode() in content]
    assert found == []
