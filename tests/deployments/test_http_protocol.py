"""The HTTP server of Ray Serve's processes over real sockets, in front of an application that echoes the request."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.deployments import http_protocol
from serve_app.deployments.http_protocol import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URI_BYTES
from serve_app.deployments.http_server import BodyCap
from serve_app.errors import ServeAppError
from tests.http_thread import serving

PART = b"x" * 65_536


@dataclass
class Server:
    """`seen` are the scopes that reached the application, and `left` the requests whose client disconnected."""

    seen: list[Scope] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    refused: list[ServeAppError] = field(default_factory=list)
    port: int = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        size, message = 0, await receive()
        while message["type"] == "http.request":
            size += len(message["body"])
            if not message.get("more_body"):
                break
            if scope["path"] == "/waits":
                await asyncio.sleep(0.05)
            message = await receive()
        if message["type"] == "http.disconnect":
            self.left.append(scope["path"])
            return
        await send({"type": "http.response.start", "status": 200})
        for _ in range(200 if scope["path"] == "/large" else 0):
            await send({"type": "http.response.body", "body": PART, "more_body": True})
        await send({"type": "http.response.body", "body": f"read {size}".encode()})
        if scope["path"] == "/large":
            self.left.append(scope["path"])

    @contextmanager
    def running(self) -> Iterator[Server]:
        with serving(self.app) as self.port:
            yield self

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def exchange(self, *parts: bytes) -> bytes:
        """All that the server answers until it closes the connection."""
        with self.connect() as connection:
            for part in parts:
                with suppress(ConnectionError):
                    connection.sendall(part)
            return received(connection)


def received(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_protocol, "_HEAD_S", 0.3)
    monkeypatch.setattr(http_protocol, "_LINGER_S", 0.2)
    one = Server()
    limits = http_protocol.ServerLimits(max_body_bytes=100_000, stalled_client_s=0.3, refused=one.refused.append)
    for module in ("http_protocol", "http_server"):
        monkeypatch.setattr(f"serve_app.deployments.{module}.LIMITS", limits)
    with one.running():
        yield one


def get(path: str = "/", *headers: str, close: bool = True) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: x", *(["Connection: close"] if close else []), *headers, "", ""]
    return "\r\n".join(lines).encode()


def check_refusal(server: Server, answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"connection: close" in head
    error = json.loads(body)
    assert error["type"] == "error"
    assert error["error"]["code"] == code
    assert error["error"]["message"]
    assert [refused.code for refused in server.refused] == [code]


LONG = {
    "headers": (get("/", *(f"x-{i}: 1" for i in range(MAX_HEADERS))), 431, "headers_too_large"),
    "header bytes": (get("/", f"x: {'a' * MAX_HEADER_BYTES}"), 431, "headers_too_large"),
    "endless header": (b"GET / HTTP/1.1\r\nx: " + b"a" * 2_000_000, 431, "headers_too_large"),
    "endless headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300_000, 431, "headers_too_large"),
    "path": (get("/" + "a" * MAX_URI_BYTES), 414, "uri_too_long"),
    "query": (get("/?" + "a" * MAX_URI_BYTES), 414, "uri_too_long"),
    "endless path": (b"GET /" + b"a" * 2_000_000, 414, "uri_too_long"),
}


@pytest.mark.parametrize(("request_", "status", "code"), LONG.values(), ids=LONG)
def test_a_head_beyond_the_bounds_is_refused(server: Server, request_: bytes, status: int, code: str) -> None:
    began = time.monotonic()
    check_refusal(server, server.exchange(request_), status, code)
    assert time.monotonic() - began < 2
    assert server.seen == []


def test_a_head_at_the_bounds_is_served(server: Server) -> None:
    many = [f"x-{i}: {'a' * 100}" for i in range(MAX_HEADERS - 2)]
    answer = server.exchange(get("/" + "a" * (MAX_URI_BYTES - 1), *many))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert len(server.seen) == 1


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
    b"GET / HTTP/1.1\r\nx\xff: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nx: a\0b\r\n\r\n",
    b"GET \x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\nab\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_not_http_is_refused(server: Server, garbage: bytes) -> None:
    check_refusal(server, server.exchange(garbage), 400, "malformed_http")


def test_a_slow_head_is_refused_and_a_silent_connection_closed(server: Server) -> None:
    check_refusal(server, server.exchange(b"GET / HTTP/1.1\r\n", b"Host: x\r\n"), 408, "request_timeout")
    began = time.monotonic()
    for silence in (b"", b"\r\n", get(close=False)[:0]):
        assert server.exchange(silence) == b""
    assert time.monotonic() - began < 3
    assert len(server.refused) == 1


def test_empty_lines_after_a_request_do_not_keep_the_connection(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(get(close=False))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\r\n")
        received(connection)
    assert server.refused == []


def test_a_slow_client_of_many_requests_is_served(server: Server) -> None:
    """The time for a head begins with each request."""
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(get(close=False))
            assert b"read 0" in connection.recv(65_536)
            time.sleep(0.2)  # the subject of the test: together longer than the limit of one head


def test_garbage_after_a_request_does_not_look_like_its_answer(server: Server) -> None:
    body = b"POST /waits HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na"
    answer = server.exchange(body, b"bc" + b"\x00\xff garbage\r\n\r\n")
    assert b"400" not in answer.partition(b"\r\n\r\n")[0] or b"200" not in answer
    assert answer.count(b"HTTP/1.1") <= 1


CONTROL = {
    "x-request-timeout-seconds": "0",
    "x-request-disconnect-disabled": "?1",
    "serve_multiplexed_model_id": "other",
    "Serve-Multiplexed-Model-Id": "other",
    "x-serve-router-target": "other",
    "X_SERVE_anything": "other",
}


def test_headers_that_control_ray_are_removed(server: Server) -> None:
    kept = {"x-session-id": "user-1", "x-request-id": "a" * 128, "traceparent": "00-1-2-01", "x-other": "é"}
    lines = [f"{name}: {value}" for name, value in (CONTROL | kept).items()]
    assert server.exchange(get("/", *lines)).startswith(b"HTTP/1.1 200 ")
    (scope,) = server.seen
    names = {name.decode(): value for name, value in scope["headers"]}
    assert names.keys() == {"host", "connection", *kept}


@pytest.mark.parametrize("name", ["x-session-id", "X_Session-ID", "x-request-id", "traceparent", "tracestate"])
@pytest.mark.parametrize("value", [b"\xff\xfe", "é".encode(), b"a" * 1025, b"a\tb"])
def test_headers_that_ray_would_fail_on_are_removed(server: Server, name: str, value: bytes) -> None:
    request = get("/").replace(b"\r\n\r\n", b"\r\n" + name.encode() + b": " + value + b"\r\n\r\n")
    assert server.exchange(request).startswith(b"HTTP/1.1 200 ")
    assert [header for header, _ in server.seen[0]["headers"]] == [b"host", b"connection"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_far_beyond_the_limit_is_refused_while_the_application_waits(server: Server, chunked: bool) -> None:
    size = 1_000_000
    head = b"POST /waits HTTP/1.1\r\nHost: x\r\n"
    if chunked:
        parts = [head + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % size + b"a" * size + b"\r\n0\r\n\r\n"]
    else:
        parts = [head + b"Content-Length: %d\r\n\r\n" % size, b"a" * size]
    with server.connect() as connection:
        for part in [*parts, get("/")]:
            connection.sendall(part)
        refusal, _, rest = received(connection).partition(b"}}")
    assert refusal.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in refusal
    assert rest.startswith(b"HTTP/1.1 200 "), "the connection is used again"
    assert [error.code for error in server.refused] == ["body_too_large"]
    assert server.left == ["/waits"], "the application sees that the client has left"


def test_a_body_within_the_limit_is_not_touched(server: Server) -> None:
    request = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 150000\r\n\r\n"
    assert b"read 150000" in server.exchange(request, b"a" * 150_000)


def test_a_client_that_takes_nothing_of_its_answer_is_disconnected(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(get("/large"))
        began = time.monotonic()
        while not server.left:
            assert time.monotonic() - began < 10
            time.sleep(0.01)
        assert len(received_or_reset(connection)) < 200 * len(PART)


def test_a_client_that_reads_slowly_gets_its_answer(server: Server) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.sendall(get("/large"))
        size, began = 0, time.monotonic()
        while part := connection.recv(1_000_000):
            size += len(part)
            if time.monotonic() - began < 1:
                time.sleep(0.1)  # the subject of the test: pauses shorter than the limit
    assert size > 200 * len(PART)


def received_or_reset(connection: socket.socket) -> bytes:
    content = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(1_000_000):
            content += part
    return content


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_an_upgrade_is_answered_without_it(server: Server, upgrade: str) -> None:
    key = ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    request = get("/", "Connection: Upgrade", f"Upgrade: {upgrade}", *key, close=False)
    with server.connect() as connection:
        connection.sendall(request)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
    assert [scope["type"] for scope in server.seen] == ["http"]


async def test_a_receive_after_the_refusal_is_a_disconnect() -> None:
    """Ray Serve goes on to receive."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"] for _ in range(3)])
        await send({"type": "http.response.start", "status": 499})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"a" * 100_000_000, "more_body": True}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await BodyCap(app)({"type": "http", "headers": []}, receive, send)
    assert seen == ["http.request", "http.disconnect", "http.disconnect"]
    assert [message.get("status") for message in sent] == [413, None]
