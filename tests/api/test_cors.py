"""Cross-origin requests of web pages: permitted to the configured origins, in every kind of response."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from pydantic import ValidationError

from serve_app.api.app import create_app
from serve_app.api.rate_limits import anthropic_headers, openai_headers
from serve_app.config import Cors
from serve_app.core.quotas import CallQuota, RateLimit

from .scripted import POSTS, ScriptedEngine, ScriptedTelemetry, app_config, chunk, error_of

RATE = RateLimit(limit=3, remaining=2, reset_s=1.0)
LIMITS = CallQuota(requests=RATE, tokens=RATE)
PAGE = "http://localhost:5173"
STRANGER = "https://evil.example"
# OpenAI's JavaScript client sends headers of its own.
ASKED = "authorization,content-type,x-request-id,x-stainless-lang,x-stainless-retry-count"
READABLE = {
    *("x-request-id", "request-id", "x-variant", "retry-after", "retry-after-ms", "x-cache"),
    *openai_headers(LIMITS),
    *anthropic_headers(LIMITS),
}
every_post = pytest.mark.parametrize("path", POSTS)


async def client_of(engine: ScriptedEngine, cors: Cors) -> AsyncIterator[httpx.AsyncClient]:
    config = app_config(max_body_bytes=20_000).model_copy(update={"cors": cors})
    transport = httpx.ASGITransport(create_app(engine, ScriptedTelemetry(), config), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def open_client(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    async for client in client_of(engine, Cors(allow_origins=(PAGE, "app://obsidian.md"), max_age_s=60)):
        yield client


@pytest.fixture
async def public_client(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    async for client in client_of(engine, Cors(allow_origins=("*",))):
        yield client


async def preflight(
    client: httpx.AsyncClient, path: str, origin: str, method: str = "POST", **headers: str
) -> httpx.Response:
    asked = {"access-control-request-method": method, "access-control-request-headers": ASKED}
    return await client.options(path, headers={"origin": origin, **asked, **headers})


def cors_headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def assert_readable(answer: httpx.Response, origin: str = PAGE) -> None:
    found = cors_headers(answer)
    exposed = found.pop("access-control-expose-headers").split(", ")
    assert found == {"access-control-allow-origin": origin}
    assert set(exposed) == READABLE
    assert "origin" in answer.headers["vary"].lower()


@pytest.mark.parametrize("path", [*POSTS, "/v1/embeddings", "/v1/models", "/nowhere"])
@pytest.mark.parametrize("origin", [PAGE, "app://obsidian.md"])
async def test_a_preflight_of_a_listed_origin_succeeds(open_client: httpx.AsyncClient, path: str, origin: str) -> None:
    for method in ("GET", "POST"):
        answer = await preflight(open_client, path, origin, method)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert method in answer.headers["access-control-allow-methods"].split(", ")
        allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
        assert set(ASKED.split(",")) <= allowed
        assert answer.headers["access-control-max-age"] == "60"
        assert answer.headers["x-request-id"]
        assert "origin" in answer.headers["vary"].lower()
        assert "access-control-allow-credentials" not in answer.headers


async def test_a_page_of_the_internet_may_call_a_service_on_this_machine(open_client: httpx.AsyncClient) -> None:
    """Chromium asks for this in a header of its own."""
    answer = await preflight(open_client, "/generate", PAGE, **{"access-control-request-private-network": "true"})
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")


@every_post
async def test_a_response_to_a_listed_origin_can_be_read(
    open_client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    body = POSTS[path] | ({"stream": True} if path.startswith("/v1") else {})
    answer = await open_client.post(path, json=body, headers={"origin": PAGE})
    assert answer.status_code == 200
    assert_readable(answer)
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/generate", b"{", 422),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/completions", b" " * 30_000, 413),
        ("POST", "/nowhere", b"{}", 404),
        ("GET", "/v1/completions", b"", 405),
        ("OPTIONS", "/v1/models", b"", 405),
        ("POST", "/generate", b'{"prompt": "hi"}', 500),
    ],
)
async def test_an_error_can_be_read_too(
    open_client: httpx.AsyncClient, engine: ScriptedEngine, method: str, path: str, content: bytes, status: int
) -> None:
    engine.plays(RuntimeError("a fault"))
    answer = await open_client.request(method, path, content=content, headers={"origin": PAGE})
    assert answer.status_code == status
    assert_readable(answer)
    assert error_of(answer)["message"]


@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost:5174", "https://localhost:5173", "*", ""])
async def test_an_origin_that_is_not_listed_gets_no_permission(open_client: httpx.AsyncClient, origin: str) -> None:
    answer = await open_client.post("/generate", json={"prompt": "hi"}, headers={"origin": origin})
    assert (answer.status_code, cors_headers(answer)) == (200, {})
    assert answer.headers["vary"] == "Origin", "a cache must not give this response to a listed origin"
    refused = await preflight(open_client, "/generate", origin)
    assert (refused.status_code, refused.headers["allow"], cors_headers(refused)) == (405, "POST", {})
    assert error_of(refused)["code"] == "method_not_allowed"


async def test_a_request_without_an_origin_gets_no_permission(open_client: httpx.AsyncClient) -> None:
    assert cors_headers(await open_client.get("/v1/models")) == {}


async def test_every_origin_can_be_permitted(public_client: httpx.AsyncClient) -> None:
    for origin in (STRANGER, "null"):
        assert (await preflight(public_client, "/generate", origin)).headers["access-control-allow-origin"] == "*"
        answer = await public_client.post("/generate_stream", json={"prompt": "hi"}, headers={"origin": origin})
        assert_readable(answer, "*")


async def test_by_default_no_origin_is_permitted(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", json={"prompt": "hi"}, headers={"origin": PAGE})
    assert (answer.status_code, cors_headers(answer), answer.headers.get("vary")) == (200, {}, None)
    assert (await preflight(client, "/generate", PAGE)).status_code == 405


async def test_an_error_in_a_stream_leaves_it_readable(open_client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a"], None), RuntimeError("a fault"))
    answer = await open_client.post("/generate_stream", json={"prompt": "hi"}, headers={"origin": PAGE})
    assert "internal_error" in answer.text
    assert_readable(answer)


@pytest.mark.parametrize(
    "origin",
    ["", "localhost:5173", "http://localhost:5173/", "http://Localhost", "HTTP://localhost", "null", "http://", "a b"],
)
def test_a_text_that_no_browser_sends_as_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin; write scheme://host"):
        Cors(allow_origins=(origin,))


@pytest.mark.parametrize(
    "origin", ["*", "http://[::1]:3000", "tauri://localhost", "chrome-extension://abc", "vscode-webview://1a"]
)
def test_origins_of_browsers_and_desktop_programs_are_accepted(origin: str) -> None:
    assert Cors(allow_origins=(origin,)).allow_origins == (origin,)
