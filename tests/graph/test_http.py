"""HTTP as clients send it, through both of Ray Serve's proxies: versions, large requests, connections, departures."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.conftest import Front
from tests.graph.service import metric_totals, wait_until, wait_until_idle

pytestmark = pytest.mark.ray

TOO_LARGE = b"a" * 3_000_000


def connect(front: Front) -> socket.socket:
    return socket.create_connection(("127.0.0.1", front.service.port), timeout=30)


def request(path: str, body: object, version: str = "1.1") -> tuple[bytes, bytes]:
    """Headers and body of a POST."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode(), content


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes the connection."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def received_until(connection: socket.socket, end: bytes) -> bytes:
    content = b""
    while end not in content:
        part = connection.recv(65_536)
        assert part, f"closed after {content!r}"
        content += part
    return content


def test_a_stream_for_http_1_0_has_no_chunks_and_arrives_as_it_is_made(front: Front) -> None:
    body = {"model": "slow", "prompt": "a", "max_tokens": 12}
    with connect(front) as connection:
        connection.sendall(b"".join(request("/generate_stream", body, "1.0")))
        beginning = received_until(connection, b"data: ")
        assert b'"finished":true' not in beginning
        head, _, stream = (beginning + received(connection)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    events = stream.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith(("data: ", ": queued")) for event in events), "no sizes of chunks"
    assert json.loads(events[-1].removeprefix("data: "))["finished"] is True


def test_a_whole_answer_for_http_1_0_has_its_length(front: Front) -> None:
    body = {"model": front.model, "prompt": "abc", "max_tokens": 3}
    with connect(front) as connection:
        connection.sendall(b"".join(request("/generate", body, "1.0")))
        head, _, content = received(connection).partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}" in head.decode().lower()
    assert b"connection: close" in head.lower()
    assert json.loads(content)["text"] == "abc"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Expect: 100-continue"],
        ["Expect:"],
        ["Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Expect:"],
    ],
    ids=lambda headers: ",".join(headers) or "none",
)
def test_curl_reads_a_413_and_sends_another_request(front: Front, headers: list[str]) -> None:
    url = front.service.url
    options = [option for header in headers for option in ("-H", header)]
    upload = ["-sS", "-w", "\n%{http_code}\n", f"{url}/v1/completions", *options, "--data-binary", "@-"]
    second = ["-sS", "-w", "\n%{http_code}\n", f"{url}/health"]
    run = subprocess.run(["curl", *upload, "--next", *second], input=TOO_LARGE, capture_output=True, timeout=30)
    assert (run.returncode, run.stderr) == (0, b"")
    refusal, status, alive, then = run.stdout.decode().splitlines()
    assert (status, json.loads(refusal)["error"]["code"]) == ("413", "body_too_large")
    assert (then, json.loads(alive)) == ("200", {"status": "alive"})


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_client_that_reads_only_after_its_upload_gets_the_413(front: Front, chunked: bool) -> None:
    """Like http.client, which then sends its next request on the same connection."""
    parts = [TOO_LARGE[:65_536]] * 40
    with closing(http.client.HTTPConnection("127.0.0.1", front.service.port, timeout=30)) as connection:
        if chunked:
            connection.request("POST", "/generate", iter(parts), encode_chunked=True)
        else:
            connection.request("POST", "/generate", b"".join(parts))
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "body_too_large")
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"alive"}'


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(front: Front) -> None:
    """The client is not invited to send it. To use the connection again, it sends the whole body nevertheless."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3000000\r\n\r\n"
    with connect(front) as connection:
        connection.sendall(head)
        assert received_until(connection, b'"code":"body_too_large"').startswith(b"HTTP/1.1 413 ")
        connection.sendall(TOO_LARGE + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200 " in received_until(connection, b'{"status":"alive"}')


def test_a_client_that_waits_for_the_invitation_to_send_its_body_is_answered(front: Front) -> None:
    head, body = request("/generate", {"model": front.model, "prompt": "abc", "max_tokens": 3})
    with connect(front) as connection:
        connection.sendall(head.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"))
        assert received_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert b'"text":"abc"' in received_until(connection, b"}")


async def test_a_compressed_body_arrives(front: Front) -> None:
    """With aiohttp, which sends it in chunks."""
    body = json.dumps({"model": front.model, "prompt": "abc" * 100, "max_tokens": 3}).encode()
    async with aiohttp.ClientSession(front.service.url) as session:
        async with session.post("/generate", data=body, compress="gzip") as answer:
            text = (await answer.json())["text"]
        async with session.post("/generate", data=bytes(900_000), compress="gzip") as refused:
            assert (refused.status, (await refused.json())["error"]["code"]) == (413, "body_too_large")
    assert text == "abc"


def answer_to(front: Front, head: bytes) -> bytes:
    """The answer to a request without a body. The server can close the connection while the request is sent."""
    answer = b""
    with connect(front) as connection, suppress(ConnectionError):
        with suppress(ConnectionError):
            connection.sendall(head)
        while not re.search(rb"\r\n\r\n.", answer, re.DOTALL):
            part = connection.recv(65_536)
            assert part, "closed without an answer"
            answer += part
    return answer


# The statuses for a long header, path and query, by proxy and the length in KiB. HAProxy limits the whole head.
LENGTHS = {
    ("haproxy", 7): (200, 404, 200),
    ("haproxy", 9): (200, 414, 414),
    ("haproxy", 16): (400, 400, 400),
    ("haproxy", 256): (400, 400, 400),
    ("python", 7): (200, 404, 200),
    ("python", 9): (200, 414, 414),
    ("python", 16): (431, 414, 414),
    ("python", 256): (431, 414, 414),
}
CODES = {400: "Bad request", 404: "not_found", 414: "uri_too_long", 431: "headers_too_large"}


@pytest.mark.parametrize(("front", "kib"), LENGTHS, indirect=["front"])
def test_long_headers_and_urls_are_served_or_refused(front: Front, kib: int) -> None:
    filler = "a" * (kib * 1024)
    lines = (
        f"GET /health HTTP/1.1\r\nAuthorization: Bearer {filler}",
        f"GET /v1/{filler} HTTP/1.1",
        f"GET /health?q={filler} HTTP/1.1",
    )
    answers = [answer_to(front, f"{line}\r\nHost: x\r\n\r\n".encode()) for line in lines]
    statuses = [int(answer[9:12]) for answer in answers]
    assert tuple(statuses) == LENGTHS[front.proxy, kib]
    for answer, status in zip(answers, statuses, strict=True):
        # HAProxy's parser has only HAProxy's own page for its refusals.
        assert status == 200 or CODES[status].encode() in answer
    if b" 404 " in answers[1]:
        assert b'"type":"invalid_request_error"' in answers[1], "the dialect of the path"
        assert len(answers[1]) < 1000, "the path is cut"


@pytest.mark.parametrize("front", ["haproxy"], indirect=True)
def test_haproxy_keeps_idle_connections_longer_than_clients_do(front: Front) -> None:
    """Towards the replicas, whose own limit is the same, HAProxy closes idle connections after seconds."""
    (process,) = front.service.find("haproxy.cfg")[:1]
    options = process.cmdline()
    configuration = Path(options[options.index("-f") + 1]).read_text()
    kept = {int(seconds) for seconds in re.findall(r"timeout http-keep-alive (\d+)s", configuration)}
    assert min(kept) > 600, "the load balancers of Google Cloud keep connections for 600 s"
    assert "pool-purge-delay" not in configuration, "HAProxy's default is 5 s"


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("idle_s", [95])
def test_a_connection_that_was_idle_for_longer_than_gos_90_s_is_served(front: Front, idle_s: float) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", front.service.port, timeout=30)) as connection:
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"alive"}'
        used = connection.sock
        time.sleep(idle_s)  # the subject of the test
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"alive"}'
        assert connection.sock is used


def leave(connection: socket.socket, reset: bool) -> None:
    """Close a connection with a FIN, or at once with an RST."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def open_requests(front: Front, bodies: Iterable[tuple[str, dict[str, Any]]]) -> list[socket.socket]:
    """A connection for each request. Every second request is sent in two packets."""
    connections = []
    for i, (path, body) in enumerate(bodies):
        head, content = request(path, body)
        connection = connect(front)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in (head, content) if i % 2 else (head + content,):
            connection.sendall(packet)
        connections.append(connection)
    return connections


async def counts(client: httpx.AsyncClient, model: str) -> tuple[float, float]:
    """How many requests to the model were cancelled, and how many are in progress."""
    cancelled = active = 0.0
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            if sample.labels.get("model") == model:
                is_cancelled = sample.labels.get("outcome") == "cancelled"
                cancelled += sample.value if sample.name == "serve_app_requests_total" and is_cancelled else 0
                active += sample.value if sample.name == "serve_app_active_requests" else 0
    return cancelled, active


@pytest.mark.perf
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_clients_that_leave_while_they_wait_are_cancelled_within_a_second(
    front: Front, front_client: httpx.AsyncClient, reset: bool
) -> None:
    """One request runs, and the others wait: streams and others. Those that would wait for too long are refused."""

    async def active_and_refused() -> tuple[float, float]:
        totals = await metric_totals(front_client)
        return totals["active_requests", front.single], totals.get(("queue_refusals_total", front.single), 0.0)

    async def all_arrived() -> bool:
        active, refused = await active_and_refused()
        return active + refused - refused_before == 40

    async def all_cancelled() -> bool:
        return (await counts(front_client, front.single))[0] >= before + waiting

    async def idle() -> bool:
        return (await counts(front_client, front.single))[1] == 0

    before, _ = await counts(front_client, front.single)
    _, refused_before = await active_and_refused()
    body = {"model": front.single, "prompt": "abc", "max_tokens": 140}
    paths = ["/generate_stream", "/generate", "/v1/completions"]
    first, *others = open_requests(front, [(paths[i % 3], body) for i in range(40)])
    await wait_until(all_arrived, every_s=0.02)
    waiting = (await active_and_refused())[0] - 1
    assert waiting >= 2
    for connection in others:
        leave(connection, reset)
    began = time.monotonic()
    await wait_until(all_cancelled, every_s=0.02)
    seconds = time.monotonic() - began
    leave(first, reset)
    await wait_until(idle, every_s=0.02)
    print(f"{front.proxy}: {waiting:.0f} cancelled after {seconds:.2f} s")
    assert seconds < 1
    await wait_until_idle(front_client, front.single)
