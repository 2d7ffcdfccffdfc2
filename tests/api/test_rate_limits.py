"""The headers with the limits a minute, and the two errors of limits, in each dialect and as the clients read them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from starlette.applications import Starlette

from serve_app.api.app import create_app
from serve_app.api.rate_limits import anthropic_headers, duration, openai_headers
from serve_app.config import QuotaOptions
from serve_app.core.engine import Engine
from serve_app.core.quotas import CallQuota, RateLimit
from serve_app.core.requests import GenerationRequest
from serve_app.core.tenants import Limits
from serve_app.gateway.counters import MemoryCounters
from serve_app.gateway.quota import Quota
from serve_app.gateway.shared_quotas import SharedQuotas
from serve_app.gateway.stage import Stage
from tests.gateway.test_quota import KeptQuotaMeter, KeptUsage, ScriptedTenants

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config
from .test_usage import ScriptedReports

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES, "max_tokens": 20}
GENERATE = {"prompt": "hi there", "max_tokens": 20}


class WithKey(Stage):
    """Gives each request a key and a tenant, as the HTTP layer does."""

    def generate(self, request: GenerationRequest) -> Any:
        return self.inner.generate(replace(request, tenant="acme", key="k1"))


def limited_app(limits: Limits) -> Starlette:
    config = app_config()
    shared = SharedQuotas(
        QuotaOptions(), ScriptedTenants(limits), MemoryCounters(clock_ms=lambda: 0), KeptUsage(), KeptQuotaMeter()
    )
    stage: Engine = WithKey(Quota(ScriptedEngine(), config.models[0], shared))
    return create_app(stage, ScriptedTelemetry(), config, usage=ScriptedReports())


@asynccontextmanager
async def limited(limits: Limits) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(limited_app(limits))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.02, "20ms"),
        (0.0004, "1ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.999, "59.999s"),
        (60, "1m0s"),
        (361, "6m1s"),
    ],
)
def test_openai_writes_times_as_go_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_headers_of_both_dialects() -> None:
    call = CallQuota(RateLimit(60, 59, 1.0), RateLimit(150_000, 149_984, 0.006))
    assert openai_headers(call) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "149984",
        "x-ratelimit-reset-tokens": "6ms",
    }
    found = anthropic_headers(call)
    kinds = ("requests", "tokens", "input-tokens", "output-tokens")
    assert set(found) == {
        f"anthropic-ratelimit-{kind}-{part}" for kind in kinds for part in ("limit", "remaining", "reset")
    }
    assert found["anthropic-ratelimit-output-tokens-remaining"] == "149984"
    reset = datetime.fromisoformat(found["anthropic-ratelimit-requests-reset"])
    assert timedelta() <= reset - datetime.now(UTC) <= timedelta(seconds=1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["anthropic-ratelimit-requests-reset"])
    assert openai_headers(CallQuota()) == anthropic_headers(CallQuota()) == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/chat/completions", CHAT, "x-ratelimit-remaining-requests"),
        ("/v1/completions", GENERATE, "x-ratelimit-remaining-requests"),
        ("/v1/messages", CHAT, "anthropic-ratelimit-requests-remaining"),
    ],
)
async def test_the_headers_are_on_answers_streams_and_refusals(
    path: str, body: dict[str, Any], name: str, stream: bool
) -> None:
    async with limited(Limits(requests_per_minute=2, tokens_per_minute=1000)) as client:
        answers = [await client.post(path, json={**body, "stream": stream}) for _ in range(3)]
        other = await client.get("/v1/models")
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers[name] for answer in answers] == ["1", "0", "0"]
    assert [name for name in answers[2].headers if "ratelimit" in name and "tokens" in name]
    assert not [name for name in other.headers if "ratelimit" in name]
    assert answers[2].headers["retry-after"] == "30"
    error = answers[2].json()["error"]
    assert error["type"] == "rate_limit_error"
    if path != "/v1/messages":
        assert error["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/chat/completions", CHAT, {"type": "insufficient_quota", "code": "insufficient_quota"}),
        ("/v1/messages", CHAT, {"type": "rate_limit_error"}),
        ("/generate", GENERATE, {"code": "insufficient_quota"}),
        ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 20}}, {"error_type": "overloaded"}),
    ],
)
async def test_a_used_up_budget_in_each_dialect(path: str, body: dict[str, Any], expected: dict[str, str]) -> None:
    async with limited(Limits(tokens_per_day=40)) as client:
        answers = [await client.post(path, json=body) for _ in range(12)]
    assert answers[0].status_code == 200
    answer = answers[-1]
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    found = answer.json()
    details = found["error"] if isinstance(found["error"], dict) else found
    assert {name: details[name] for name in expected} == expected


async def test_a_stream_that_is_refused_has_no_body_of_events() -> None:
    async with limited(Limits(requests_per_minute=1)) as client:
        await client.post("/generate_stream", json=GENERATE)
        answer = await client.post("/generate_stream", json=GENERATE)
    assert (answer.status_code, answer.headers["content-type"]) == (429, "application/json")
    assert json.loads(answer.content)["error"]["code"] == "rate_limit_exceeded"


async def test_openais_client_raises_its_error_and_reads_the_headers() -> None:
    transport = httpx2.ASGITransport(limited_app(Limits(requests_per_minute=1)))
    async with httpx2.AsyncClient(transport=transport) as client:
        sdk = openai.AsyncOpenAI(base_url="http://test/v1", api_key="k", http_client=client, max_retries=0)
        raw = await sdk.chat.completions.with_raw_response.create(model="small", messages=MESSAGES, max_tokens=9)
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as error:
            await sdk.chat.completions.create(model="small", messages=MESSAGES, max_tokens=9)
    assert error.value.code == "rate_limit_exceeded"


async def test_anthropics_client_raises_its_error_and_reads_the_headers() -> None:
    transport = httpx2.ASGITransport(limited_app(Limits(requests_per_minute=1, tokens_per_minute=5000)))
    async with httpx2.AsyncClient(transport=transport) as client:
        sdk = anthropic.AsyncAnthropic(base_url="http://test", api_key="k", http_client=client, max_retries=0)
        raw = await sdk.messages.with_raw_response.create(model="small", messages=MESSAGES, max_tokens=9)
        assert raw.headers["anthropic-ratelimit-tokens-limit"] == "5000"
        with pytest.raises(anthropic.RateLimitError):
            await sdk.messages.create(model="small", messages=MESSAGES, max_tokens=9)


async def test_several_answers_are_one_request() -> None:
    async with limited(Limits(requests_per_minute=5, tokens_per_minute=10_000)) as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "n": 4})
        assert answer.headers["x-ratelimit-remaining-requests"] == "4"
        answer = await client.post("/generate_batch", json={"prompts": ["a", "b", "c"], "max_tokens": 5})
        assert len(answer.json()["results"]) == 3
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/messages"])
async def test_the_document_describes_the_headers(path: str) -> None:
    async with limited(Limits(requests_per_minute=10, tokens_per_minute=1000)) as client:
        answer = await client.post(path, json=GENERATE if path == "/generate" else CHAT)
        described = (await client.get("/openapi.json")).json()["paths"][path]["post"]["responses"]["200"]["headers"]
    assert {name for name in answer.headers if "ratelimit" in name} == {
        name for name in described if "ratelimit" in name
    }
