"""The Python clients of OpenAI and Anthropic with API keys, over a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anthropic
import openai
import pytest

from serve_app.core.tenants import CredentialsRefused, Identity, Scope

from .scripted import ScriptedEngine, ScriptedTelemetry, chunk
from .server import served

GOOD, METRICS = "sk-good", "sk-metrics"


class TwoKeys:
    """An authenticator with a key for models and a key for metrics."""

    async def authenticate(self, credentials: str) -> Identity:
        scopes = {GOOD: Scope.INFERENCE, METRICS: Scope.METRICS}
        if credentials not in scopes:
            raise CredentialsRefused("invalid", "The API key is not valid.")
        return Identity("acme", credentials, frozenset({scopes[credentials]}))


@pytest.fixture
async def url(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[str]:
    engine.plays(chunk(["Par", "is"]))
    async with served(engine, telemetry, authenticator=TwoKeys()) as url:
        yield url


async def test_openais_client(url: str, engine: ScriptedEngine) -> None:
    def client(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    async with client(GOOD) as good:
        answer = await good.chat.completions.create(model="small", messages=[{"role": "user", "content": "Where?"}])
        assert answer.choices[0].message.content == "Paris"
        stream = await good.completions.create(model="small", prompt="Where?", stream=True)
        assert "".join([part.choices[0].text async for part in stream]) == "Paris"
    assert {(request.tenant, request.key) for request in engine.requests} == {("acme", GOOD)}
    async with client("wrong") as wrong:
        with pytest.raises(openai.AuthenticationError, match="The API key is not valid") as refused:
            await wrong.models.list()
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "authentication_error")
    async with client(METRICS) as metrics:
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            await metrics.models.list()
        assert (forbidden.value.code, forbidden.value.type) == ("permission_denied", "permission_error")


async def test_anthropics_client(url: str, engine: ScriptedEngine) -> None:
    """With `api_key`, which it sends as `x-api-key`, and with `auth_token`, a bearer token."""
    for client in (
        anthropic.AsyncAnthropic(base_url=url, max_retries=0, api_key=GOOD),
        anthropic.AsyncAnthropic(base_url=url, max_retries=0, auth_token=GOOD),
    ):
        async with client as good:
            answer = await good.messages.create(
                model="small", max_tokens=5, messages=[{"role": "user", "content": "Where?"}]
            )
            assert answer.content[0].to_dict()["text"] == "Paris"
    assert {(request.tenant, request.key) for request in engine.requests} == {("acme", GOOD)}
    async with anthropic.AsyncAnthropic(base_url=url, max_retries=0, api_key="wrong") as wrong:
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            await wrong.messages.count_tokens(model="small", messages=[{"role": "user", "content": "Where?"}])
    async with anthropic.AsyncAnthropic(base_url=url, max_retries=0, api_key=METRICS) as metrics:
        with pytest.raises(anthropic.PermissionDeniedError, match="permission_error"):
            await metrics.messages.count_tokens(model="small", messages=[{"role": "user", "content": "Where?"}])
