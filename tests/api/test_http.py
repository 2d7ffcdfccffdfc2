"""HTTP over real sockets: methods, paths and versions, with uvicorn as Ray Serve runs it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import openai
import pytest
from starlette.routing import Route

from serve_app import __version__
from serve_app.api.app import create_app
from tests.http_thread import serving

from .scripted import BEAT, POSTS, ScriptedEngine, ScriptedTelemetry, app_config, check_error, chunk, echo

BODIES = POSTS | {"/tokenize": {"prompt": "hi"}, "/detokenize": {"tokens": [1]}}
GETS = [
    *("/v1/models", "/v1/models/small", "/v1/models/org/large", "/info", "/health", "/ready", "/ping", "/version"),
    *("/load", "/experiments", "/metrics", "/openapi.json", "/docs", "/docs/reference.js", "/", "/playground/app.js"),
    *("/v1/files", "/v1/files/f1", "/v1/files/f1/content", "/v1/batches", "/v1/batches/b1"),
    *("/v1/responses/resp_1", "/v1/responses/resp_1/input_items", "/tokenizer_info", "/v1/usage"),
]
JSON = {"content-type": "application/json"}


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """The response and its body. http.client sends the path as it is."""
    connection.request(method, path, None if body is None else json.dumps(body), JSON)
    response = connection.getresponse()
    return response, response.read()


@dataclass
class Server:
    """The application behind uvicorn at a port of its own, in a thread."""

    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    telemetry: ScriptedTelemetry = field(default_factory=ScriptedTelemetry)
    port: int = 0

    @property
    def routes(self) -> list[Route]:
        app = create_app(self.engine, self.telemetry, app_config())
        return [route for route in app.routes if isinstance(route, Route)]

    @contextmanager
    def running(self) -> Iterator[Server]:
        app = create_app(self.engine, self.telemetry, app_config(heartbeat_s=0.05))
        with serving(app, ws="none") as self.port:
            yield self

    @contextmanager
    def connected(self) -> Iterator[http.client.HTTPConnection]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            yield connection

    def ask(self, method: str, path: str, body: object = None) -> tuple[http.client.HTTPResponse, bytes]:
        """The response to one request and its body."""
        with self.connected() as connection:
            return ask(connection, method, path, body)

    def send(self, request: bytes) -> bytes:
        """All that the server sends until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server().running() as server:
        yield server


def test_the_table_has_every_get_route(server: Server) -> None:
    patterns = [route.path_regex for route in server.routes if "GET" in (route.methods or ())]
    assert len(GETS) == len(patterns) + 1  # two ids of models
    assert all(any(pattern.fullmatch(path) for path in GETS) for pattern in patterns)


@pytest.mark.parametrize("path", [*GETS, "/nowhere", "/v1/nowhere"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    with server.connected() as connection:
        got, content = ask(connection, "GET", path)
        head, nothing = ask(connection, "HEAD", path)
        assert ask(connection, "GET", "/health")[0].status == 200, "the connection can be used again"
    assert (head.status, nothing) == (got.status, b"")
    assert int(head.headers["content-length"]) in (len(content), len(content) + 1)  # the length of /metrics grows
    varying = {"date", "x-request-id", "request-id", "content-length"}
    assert {n: v for n, v in head.headers.items() if n not in varying} == {
        n: v for n, v in got.headers.items() if n not in varying
    }


@pytest.mark.parametrize("path", [*GETS, *BODIES])
def test_options_without_cors_is_a_405_with_the_methods(server: Server, path: str) -> None:
    answer, content = server.ask("OPTIONS", path)
    allowed = {method for route in server.routes if route.path_regex.fullmatch(path) for method in route.methods or ()}
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert check_error(path, json.loads(content), answer.headers["x-request-id"])["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("form", ["{}/", "/{}", "{}//", "//{}///"])
def test_slashes_too_many_change_nothing(server: Server, path: str, form: str) -> None:
    answer, _ = server.ask("POST", form.format(path), BODIES[path])
    assert answer.status == 200


@pytest.mark.parametrize("path", [path for path in GETS if path != "/docs"])
def test_slashes_too_many_change_nothing_for_get(server: Server, path: str) -> None:
    plain, _ = server.ask("GET", path)
    absent = any(part in path for part in ("/resp_1", "/v1/files", "/v1/batches", "/v1/usage"))  # it has no keys
    assert plain.status == (404 if absent else 200)
    for form in (f"{path}/", f"/{path}", path.replace("/", "//") + "//"):
        answer, _ = server.ask("GET", form)
        assert (answer.status, answer.headers["content-type"]) == (plain.status, plain.headers["content-type"])


def test_the_reference_with_a_slash_redirects_because_its_files_are_beside_its_path(server: Server) -> None:
    answer, _ = server.ask("GET", "/docs/")
    assert (answer.status, answer.headers["location"]) == (308, "../docs")


def test_an_unknown_path_with_slashes_has_the_dialect_of_the_path_without_them(server: Server) -> None:
    for path in ("//v1/nowhere", "/v1//nowhere/", "/v1/v1/chat/completions"):
        answer, content = server.ask("POST", path, {})
        assert answer.status == 404
        error = check_error("/v1", json.loads(content), "")
        assert error["code"] == "not_found"


def request(version: str, path: str, body: object, method: str = "POST") -> bytes:
    content = json.dumps(body).encode()
    head = f"{method} {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    return f"{head}\r\n".encode() + (b"" if method == "HEAD" else content)


@pytest.mark.parametrize(
    "path", ["/generate_stream", "/v1/completions", "/v1/chat/completions", "/generate", "/health"]
)
def test_an_answer_to_http_1_0_has_no_chunks_and_ends_with_the_connection(server: Server, path: str) -> None:
    method = "GET" if path == "/health" else "POST"
    body = BODIES.get(path, {}) | ({"stream": True} if path.startswith("/v1") else {})
    server.engine.plays(chunk(["a"], None), 0.12, chunk(["b"], start=1))
    try:
        head, _, content = server.send(request("1.0", path, body, method)).partition(b"\r\n\r\n")
    finally:
        server.engine.script = echo
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    if path in ("/generate", "/health"):
        assert f"content-length: {len(content)}".encode() in head
        json.loads(content)
        return
    events = content.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith(("data: ", ": queued")) for event in events), "no sizes of chunks"
    assert ": queued" in events
    assert len(events) >= 4


def test_an_event_reaches_http_1_0_when_it_is_made(server: Server) -> None:
    server.engine.plays(chunk(["first"], None), 0.5, chunk(["last"], start=1))
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(request("1.0", "/generate_stream", BODIES["/generate_stream"]))
            received = b""
            while b"first" not in received:
                received += connection.recv(65_536)
            assert b"last" not in received
            received += b"".join(iter(lambda: connection.recv(65_536), b""))
    finally:
        server.engine.script = echo
    assert b"last" in received


def test_a_stream_for_http_1_1_still_has_chunks(server: Server) -> None:
    answer, content = server.ask("POST", "/generate_stream", BODIES["/generate_stream"])
    assert answer.headers["transfer-encoding"] == "chunked"
    assert content.startswith(b"data: ")


def test_errors_and_head_for_http_1_0(server: Server) -> None:
    refused = server.send(request("1.0", "/generate_stream", {}))
    assert refused.startswith(b"HTTP/1.1 422 ")
    head, _, content = refused.partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in head
    assert server.send(request("1.0", "/health", {}, "HEAD")).endswith(b"\r\n\r\n")


def test_a_heartbeat_is_no_event_for_openais_client(server: Server) -> None:
    server.engine.plays(BEAT, BEAT, chunk(["a"], None), BEAT, chunk(["b"], start=1))
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="small", prompt="hi", stream=True)
            assert [part.choices[0].text for part in stream] == ["a", "b"]
    finally:
        server.engine.script = echo


def test_the_version(server: Server) -> None:
    assert json.loads(server.ask("GET", "/version")[1]) == {"version": __version__}


def test_the_load_counts_requests_in_progress(server: Server) -> None:
    def load() -> int:
        return int(json.loads(server.ask("GET", "/load")[1])["server_load"])

    assert load() == 0
    server.engine.plays(chunk(["a"], None), 0.3, chunk(["b"], start=1))
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(request("1.0", "/generate_stream", BODIES["/generate_stream"]))
            assert connection.recv(1000)
            assert load() == 2, "the scripted engine counts the same request for each of its two models"
            assert b"".join(iter(lambda: connection.recv(65_536), b""))
    finally:
        server.engine.script = echo
    assert load() == 0
