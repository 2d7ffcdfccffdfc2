"""Authentication: every route against every kind of key, and what a key shows of other tenants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from serve_app.api.app import create_app
from serve_app.api.auth import POLICIES, PUBLIC
from serve_app.auth_config import AuthOptions
from serve_app.core.experiments import Feedback
from serve_app.core.tenants import Identity, Scope
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.api_key import ApiKey, new_key
from serve_app.tenants.authenticator import KeyAuthenticator
from serve_app.tenants.store import NewKey, TenantStore

from .scripted import POSTS, ScriptedEngine, ScriptedTelemetry, app_config

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
# What the S4 matrix sends to each route with a path that exists for the scripted service.
PATHS = {
    "/v1/responses/{id}": "/v1/responses/resp_1",
    "/v1/responses/{id}/cancel": "/v1/responses/resp_1/cancel",
    "/v1/responses/{id}/input_items": "/v1/responses/resp_1/input_items",
    "/v1/models/{id:path}": "/v1/models/org/large",
    "/docs/{file}": "/docs/reference.js",
    "/playground/{file}": "/playground/app.js",
}


class Keys:
    """The keys of a service with two tenants, by what they are for."""

    def __init__(self, store: TenantStore) -> None:
        store.set_tenant("acme")
        store.set_tenant("other")
        self.all = self._create(store, NewKey("acme", scopes=frozenset(Scope)))
        self.inference = self._create(store, NewKey("acme"))
        self.metrics = self._create(store, NewKey("acme", scopes=frozenset({Scope.METRICS})))
        self.admin = self._create(store, NewKey("acme", scopes=frozenset({Scope.ADMIN})))
        self.other = self._create(store, NewKey("other"))
        self.small = self._create(store, NewKey("acme", models=frozenset({"small"})))
        self.adapter = self._create(store, NewKey("acme", models=frozenset({"support"})))
        self.expired = self._create(store, NewKey("acme", scopes=frozenset(Scope), ttl_s=-1))
        self.revoked = self._create(store, NewKey("acme", scopes=frozenset(Scope)))
        store.revoke_key(self.revoked.id)
        self.unknown = new_key()
        self.wrong = ApiKey(self.all.id, new_key().secret)

    @staticmethod
    def _create(store: TenantStore, wanted: NewKey) -> ApiKey:
        return store.create_key(wanted)[0]


class Service:
    """The application with keys in an SQLite database, over a scripted engine."""

    def __init__(self, folder: Path) -> None:
        options = DatabaseOptions(url=f"sqlite:///{folder / 'keys.db'}")
        store = TenantStore(open_database(options))
        self.keys = Keys(store)
        store.close()
        self.authenticator = KeyAuthenticator(AuthOptions(), options)
        self.authenticator.start()
        self.engine, self.telemetry = ScriptedEngine(), ScriptedTelemetry()
        self.audited: list[tuple[Any, ...]] = []
        self.app = create_app(
            self.engine, self.telemetry, app_config(), authenticator=self.authenticator, audit=self._audit
        )

    async def _audit(self, *about: Any) -> None:
        self.audited.append(about)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("keys"))
    yield service
    service.authenticator.stop()


@pytest.fixture
def service(shared: Service) -> Service:
    shared.engine.requests.clear()
    shared.telemetry.auth_refusals.clear()
    shared.audited.clear()
    return shared


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        yield client


def bearer(key: object) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes() -> list[tuple[str, str]]:
    """The method and the path of every route."""
    app = create_app(ScriptedEngine(), ScriptedTelemetry(), app_config())
    found = [route for route in app.routes if isinstance(route, Route)]
    assert len(found) == len(app.routes)
    return [(method, route.path) for route in found for method in sorted((route.methods or set()) - {"HEAD"})]


def test_every_route_has_a_policy_and_every_policy_a_route() -> None:
    assert {f"{method} {path}" for method, path in routes()} == set(POLICIES)


def test_only_these_routes_need_no_key() -> None:
    public = {route for route, needed in POLICIES.items() if needed is PUBLIC}
    pages = {"GET /", "GET /playground/{file}", "GET /docs", "GET /docs/{file}", "GET /openapi.json"}
    assert public == {"GET /health", "GET /ready", "GET /ping", *pages}


def variants(path: str) -> list[tuple[str, dict[str, str]]]:
    """The path and headers of requests by which a caller could try to get around the check."""
    tricks = [
        {"host": "test/health?"},
        {"host": "test/health#"},
        {"host": "test:80/docs"},
        {"x-forwarded-host": "test/health"},
        {"x-original-url": "/health"},
        {"x-rewrite-url": "/health"},
        {"x-http-method-override": "GET"},
    ]
    paths = [
        f"/{path}",
        f"{path}/",
        f"//{path}//",
        f"/health/..{path}",
        f"/health/%2e%2e{path}",
        f"/docs/..%2f..{path}",
    ]
    paths += [path.upper(), path.replace("/", "/./", 1), path.replace("/", "/%2e/", 1), f"{path}?x=/health"]
    paths += [f"{path}%00", f"{path};/health", f"{path}%23", path.replace("e", "%65")]
    return [*((path, headers) for headers in tricks), *((one, {}) for one in paths)]


async def ask(service: Service, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """The answer to a request whose path is sent as it is, decoded once as uvicorn does."""
    raw, _, query = path.partition("?")
    sent: list[Any] = []
    read: list[bool] = []
    body = json.dumps({**POSTS.get(raw, CHAT)}).encode()

    async def receive() -> dict[str, Any]:
        if read:
            await asyncio.Event().wait()
        read.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": httpx.URL(f"http://test{raw}").path if "%" not in raw else _decoded(raw),
        "raw_path": raw.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "server": ("test", 80),
        "headers": [(b"host", b"test"), *((name.encode(), value.encode()) for name, value in headers.items())],
    }
    if "host" in headers:
        scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    await service.app(scope, receive, send)
    return (
        sent[0]["status"],
        {name.decode(): value.decode() for name, value in sent[0]["headers"]},
        b"".join(message.get("body", b"") for message in sent[1:]),
    )


def _decoded(path: str) -> str:
    from urllib.parse import unquote

    return unquote(path)


@pytest.mark.parametrize(("method", "path"), routes())
async def test_every_route_with_every_kind_of_key(service: Service, method: str, path: str) -> None:
    needed, keys, sent = POLICIES[f"{method} {path}"], service.keys, PATHS.get(path, path)
    refused = (keys.unknown, keys.wrong, keys.expired, keys.revoked, str(keys.all).lower(), "", "x", "é")
    answers = {key: await ask(service, method, sent, bearer(key)) for key in refused}
    answers["no header"] = await ask(service, method, sent, {})
    for key, (status, headers, _) in answers.items():
        if needed is PUBLIC:
            assert status in (200, 304, 307, 308), key
        else:
            assert status == 401, key
            assert headers["www-authenticate"] == 'Bearer realm="serve_app"'
    assert service.engine.requests == []
    for key, scopes in (
        (keys.inference, {Scope.INFERENCE}),
        (keys.metrics, {Scope.METRICS}),
        (keys.admin, {Scope.ADMIN}),
        (keys.all, set(Scope)),
    ):
        status, _, body = await ask(service, method, sent, bearer(key))
        assert (status == 403) == (needed not in (PUBLIC, None) and needed not in scopes), body
        assert status != 401


@pytest.mark.parametrize(("method", "path"), [one for one in routes() if POLICIES[f"{one[0]} {one[1]}"] is not PUBLIC])
async def test_no_trick_gets_around_the_check(service: Service, method: str, path: str) -> None:
    """Each request is either refused, or is one to a public page that does not know the protected path."""
    sent = PATHS.get(path, path)
    for trick, headers in variants(sent):
        for verb in dict.fromkeys((method, "HEAD" if method == "GET" else "GET", "PUT", "OPTIONS", "TRACE")):
            if (verb, trick.strip("/")) in {("GET", ""), ("HEAD", "")} or (sent == "/" and verb in ("GET", "HEAD")):
                continue  # the playground
            status, _, body = await ask(service, verb, trick, headers)
            assert status in (401, 404), (verb, trick, headers, body)
    assert service.engine.requests == []


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1/messages/nothing", "/HEALTH", "/Docs"])
async def test_a_path_that_does_not_exist_needs_a_key(service: Service, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS"):
        assert (await ask(service, method, path, {}))[0] == 401
        assert (await ask(service, method, path, bearer(service.keys.all)))[0] == 404
    assert (await ask(service, "PUT", "/generate", {}))[0] == 401
    assert (await ask(service, "PUT", "/generate", bearer(service.keys.inference)))[0] == 405


async def test_an_unknown_id_and_a_wrong_secret_get_the_same_answer(
    client: httpx.AsyncClient, service: Service
) -> None:
    answers = [
        await client.get("/v1/models", headers={**bearer(key), "x-request-id": "same"})
        for key in (service.keys.unknown, service.keys.wrong)
    ]
    assert answers[0].content == answers[1].content
    assert answers[0].headers == answers[1].headers
    assert service.telemetry.auth_refusals == ["invalid", "invalid"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            "/v1/chat/completions",
            CHAT,
            {"error": {"type": "authentication_error", "code": "invalid_api_key", "param": None}},
        ),
        ("/v1/messages", CHAT, {"type": "error", "error": {"type": "authentication_error"}}),
        ("/generate", {"prompt": "hi"}, {"error": {"code": "invalid_api_key", "param": None}}),
    ],
)
async def test_the_error_has_the_form_of_the_dialect(
    client: httpx.AsyncClient, service: Service, path: str, body: Any, expected: dict[str, Any]
) -> None:
    answer = await client.post(path, json=body, headers={"x-api-key": str(service.keys.wrong)})
    assert answer.status_code == 401
    found = answer.json()
    assert {**found["error"], **expected["error"]} == found["error"]
    assert found["error"]["message"] == "The API key is not valid."
    refused = await client.post(path, json=body, headers={"x-api-key": str(service.keys.metrics)})
    assert refused.status_code == 403
    kind = refused.json()["error"].get("type", "")
    assert kind in ("", "permission_error")
    assert "'inference'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("key", ["expired", "revoked"])
async def test_the_owner_learns_why_a_key_is_refused(client: httpx.AsyncClient, service: Service, key: str) -> None:
    answer = await client.get("/v1/models", headers=bearer(getattr(service.keys, key)))
    assert key in answer.json()["error"]["message"]
    assert service.telemetry.auth_refusals == [key]


async def test_a_refused_call_is_counted_under_its_route(client: httpx.AsyncClient, service: Service) -> None:
    service.telemetry.calls.clear()
    await client.get("/v1/models/org/large")
    await client.get("/nothing")
    await client.get("/v1/models", headers=bearer(service.keys.all))
    await client.get("/nothing", headers=bearer(service.keys.all))
    found = [(call.route, call.status) for call in service.telemetry.calls]
    assert found == [("/v1/models/{id:path}", 401), ("other", 401), ("/v1/models", 200), ("other", 404)]


async def test_a_key_in_both_headers_must_agree(client: httpx.AsyncClient, service: Service) -> None:
    keys = service.keys
    for headers, status in (
        ({"x-api-key": str(keys.inference)}, 200),
        ({"x-api-key": str(keys.inference), **bearer(keys.inference)}, 200),
        ({"authorization": f"bearer  {keys.inference}"}, 200),
        ({"authorization": "Basic eDp5", "x-api-key": str(keys.inference)}, 200),
        ({"authorization": "Basic eDp5"}, 401),
        ({"authorization": str(keys.inference)}, 401),
        ({"x-api-key": str(keys.inference), **bearer(keys.other)}, 401),
        ({"x-api-key": str(keys.inference), **bearer(keys.wrong)}, 401),
    ):
        assert (await client.get("/v1/models", headers=headers)).status_code == status, headers
    twice = [("authorization", f"Bearer {keys.inference}"), ("authorization", f"Bearer {keys.other}")]
    assert (await client.get("/v1/models", headers=twice)).status_code == 401
    assert service.telemetry.auth_refusals == ["missing", "missing", "conflict", "conflict", "conflict"]


async def test_requests_carry_the_tenant_and_the_key(client: httpx.AsyncClient, service: Service) -> None:
    for path, body in {**POSTS, "/v1/messages": CHAT}.items():
        service.engine.requests.clear()
        await client.post(path, json=body, headers={**bearer(service.keys.inference), "x-session-id": "s"})
        assert service.engine.requests, path
        for request in service.engine.requests:
            assert (request.tenant, request.key) == ("acme", service.keys.inference.id)
            assert request.session == "acme\0s"
            assert request.prefix_salt == "acme\0"


async def test_a_key_sees_and_uses_only_its_models(client: httpx.AsyncClient, service: Service) -> None:
    keys = service.keys
    expected = {keys.inference: ["small", "org/large", "support"], keys.small: ["small"], keys.adapter: ["support"]}
    for key, names in expected.items():
        listed = (await client.get("/v1/models", headers=bearer(key))).json()["data"]
        assert [card["id"] for card in listed] == names
        document = (await client.get("/openapi.json", headers=bearer(key))).json()
        (parameter,) = document["paths"]["/v1/models/{id}"]["get"]["parameters"]
        assert parameter["schema"]["enum"] == names
        for name in ("small", "org/large", "support", "nothing"):
            answers = [
                await client.get(f"/v1/models/{name}", headers=bearer(key)),
                await client.post("/v1/chat/completions", json={**CHAT, "model": name}, headers=bearer(key)),
                await client.post("/v1/messages", json={**CHAT, "model": name}, headers=bearer(key)),
                await client.post("/generate", json={"prompt": "hi", "model": name}, headers=bearer(key)),
                await client.post("/tokenize", json={"prompt": "hi", "model": name}, headers=bearer(key)),
                await client.get(f"/info?model={name}", headers=bearer(key)),
                await client.get(f"/tokenizer_info?model={name}", headers=bearer(key)),
            ]
            assert {answer.status_code for answer in answers} == {200 if name in names else 404}, (key, name)
    hidden = await client.get("/v1/models/org/large", headers=bearer(keys.small))
    missing = await client.get("/v1/models/org/largo", headers=bearer(keys.small))
    assert hidden.text.replace("large", "largo") == missing.text
    batch = {"prompts": ["hi"], "model": "org/large"}
    assert (await client.post("/generate_batch", json=batch, headers=bearer(keys.small))).status_code == 404


async def test_a_request_without_a_model_goes_to_the_first_that_the_key_may_use(
    client: httpx.AsyncClient, service: Service
) -> None:
    for key, status in ((service.keys.small, 200), (service.keys.adapter, 404)):
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))).status_code == status


async def test_the_document_without_a_key_names_no_model(client: httpx.AsyncClient) -> None:
    text = (await client.get("/openapi.json")).text
    assert "org/large" not in text
    assert '"small"' not in text
    operation = json.loads(text)["paths"]["/v1/models/{id}"]["get"]
    assert operation["parameters"][0]["schema"] == {"type": "string"}
    assert operation["security"] == [{"bearer": []}, {"apiKey": []}, {}]


async def test_stored_responses_belong_to_a_tenant(client: httpx.AsyncClient, service: Service) -> None:
    mine, other = bearer(service.keys.inference), bearer(service.keys.other)
    made = (await client.post("/v1/responses", json={"input": "hi"}, headers=mine)).json()
    path = f"/v1/responses/{made['id']}"
    assert (await client.get(path, headers=other)).status_code == 404
    assert (await client.get(f"{path}/input_items", headers=other)).status_code == 404
    assert (await client.post(f"{path}/cancel", headers=other)).status_code == 404
    assert (await client.delete(path, headers=other)).status_code == 404
    follow = {"input": "more", "previous_response_id": made["id"]}
    assert (await client.post("/v1/responses", json=follow, headers=other)).status_code == 400
    reference = {"input": [{"type": "item_reference", "id": made["output"][0]["id"]}]}
    assert (await client.post("/v1/responses", json=reference, headers=other)).status_code == 404
    assert (await client.post("/v1/responses", json=follow, headers=mine)).status_code == 200
    colleague = bearer(service.keys.all)
    assert (await client.get(path, headers=colleague)).status_code == 200
    assert (await client.delete(path, headers=mine)).status_code == 200


async def test_feedback_is_for_calls_of_the_own_tenant(service: Service) -> None:
    from serve_app.api.experiments import FeedbackBody

    body = FeedbackBody(request_id="r", rating="up")
    assert body.to_feedback("acme") == Feedback("r", 1.0, "", "acme")


async def test_adapters_are_loaded_by_administrators_and_audited(client: httpx.AsyncClient, service: Service) -> None:
    load = {"lora_name": "legal", "lora_path": "/adapters/legal", "base_model_name": "small"}
    assert (await client.post("/v1/load_lora_adapter", json=load, headers=bearer(service.keys.inference))).is_error
    assert service.audited == []
    for path, body in (("load", load), ("unload", {"lora_name": "legal"})):
        answer = await client.post(f"/v1/{path}_lora_adapter", json=body, headers=bearer(service.keys.admin))
        assert answer.status_code == 200, answer.text
    identity = Identity("acme", service.keys.admin.id, frozenset({Scope.ADMIN}))
    details = {"model": "small", "source": "/adapters/legal", "digest": "0" * 32}
    assert service.audited == [
        (identity, "adapters.load", "legal", details),
        (identity, "adapters.unload", "legal", {"model": "small"}),
    ]


async def test_keys_that_were_never_read_are_an_error_of_the_service(tmp_path: Path) -> None:
    """Health checks and pages go on."""
    options = DatabaseOptions(url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    authenticator = KeyAuthenticator(AuthOptions(), options)
    authenticator.start()
    telemetry = ScriptedTelemetry()
    app = create_app(ScriptedEngine(), telemetry, app_config(), authenticator=authenticator)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.get("/v1/models", headers=bearer(new_key()))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert (await client.get("/v1/models")).status_code == 401
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/openapi.json", headers=bearer(new_key()))).status_code == 200
    finally:
        authenticator.stop()
    assert telemetry.auth_refusals == ["unavailable", "missing"]


async def test_many_calls_at_once_keep_their_identities(client: httpx.AsyncClient, service: Service) -> None:
    keys = [service.keys.inference, service.keys.other, service.keys.all] * 20
    await asyncio.gather(*(client.post("/generate", json={"prompt": key.id}, headers=bearer(key)) for key in keys))
    assert len(service.engine.requests) == len(keys)
    for request in service.engine.requests:
        assert request.prompt.text == request.key  # type: ignore[union-attr]
