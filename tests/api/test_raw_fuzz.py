"""Mutated bytes over real sockets: never a status of 500 or above, a leak or a hang, and the engine answers afterwards.

tests/clients/test_fuzz.py mutates the JSON of client libraries' requests.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator

import pytest

from .scripted import echo
from .test_http import Server

SEED = 20_262
CONCURRENT = 32
BODY = json.dumps({"prompt": "hi", "max_tokens": 2, "stream": False}).encode()


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    head = [b"POST %s HTTP/1.1" % path.encode(), b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"", body])


CHUNKED = b"5\r\n" + BODY[:5] + b"\r\n%x\r\n" % (len(BODY) - 5) + BODY[5:] + b"\r\n0\r\n\r\n"
REQUESTS = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models?limit=3 HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nAuthorization: Bearer abc\r\n\r\n",
    post("/generate", BODY, b"Content-Type: application/json", b"x-request-id: abc", b"x-session-id: s"),
    post("/generate_stream", BODY, b"Connection: close"),
    post("/v1/completions", BODY, b"Content-Encoding: gzip"),
    post("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}]}', b"Expect: 100-continue"),
    b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    b"HEAD / HTTP/1.0\r\n\r\n",
]
# Bytes with a meaning in HTTP or JSON, and some that are in neither.
TOKENS = [
    *(b"\r\n", b"\n", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b":", b" ", b"%00", b"%2e%2e/", b"//", b"?", b"#"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 99999999999\r\n", b"Content-Length: -1\r\n"),
    *(b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"Content-Encoding: zstd\r\n"),
    *(b"x-request-timeout-seconds: nan\r\n", b"traceparent: \xff\r\n", b"a: " + b"b" * 20_000, b"a: b\r\n" * 150),
    *(b"HTTP/1.0", b"HTTP/2.0", b"NaN", b"1e400", b"[" * 300, b"{", b'"', b"\\ud800", b"\\u0000", b"9" * 5000, b"null"),
    b"0\r\n\r\n",
]


def mutated(count: int) -> Iterator[bytes]:
    rng = random.Random(SEED)
    for _ in range(count):
        request = rng.choice(REQUESTS)
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(request) + 1), rng.randint(1, 12)
            match rng.randrange(6):
                case 0:
                    request = request[:at] + request[at + length :]
                case 1:
                    request = request[:at] + rng.randbytes(length) + request[at + length :]
                case 2:
                    request = request[:at] + rng.choice(TOKENS) + request[at:]
                case 3:
                    request = request[:at] + request[at : at + length] * rng.randint(2, 50) + request[at + length :]
                case 4:
                    request = request[:at]
                case _:
                    request += rng.choice(REQUESTS)
        yield request


async def exchange(port: int, request: bytes) -> bytes:
    """What the server sends until it closes the connection, or until it sends nothing for 0.1 s."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(request)
        while part := await asyncio.wait_for(reader.read(65_536), 0.1):
            answer += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


async def fuzz(server: Server, count: int) -> None:
    slots, statuses = asyncio.Semaphore(CONCURRENT), dict[int, int]()

    async def one(request: bytes) -> None:
        try:
            answer = await exchange(server.port, request)
        finally:
            slots.release()
        for status in map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)):
            statuses[status] = statuses.get(status, 0) + 1
            assert status < 500, f"{answer[:500]!r}: {request[:2000]!r}"

    async with asyncio.TaskGroup() as tasks:
        for request in mutated(count):
            await slots.acquire()
            tasks.create_task(one(request))
    print(f"{count} inputs: {dict(sorted(statuses.items()))}")
    assert {200, 400, 404, 422} <= statuses.keys(), "the mutations are too weak or too strong"
    async with asyncio.timeout(10):
        while server.telemetry.open_calls or server.engine.running:  # noqa: ASYNC110 (of another thread)
            await asyncio.sleep(0.02)
    assert await asyncio.to_thread(server.ask, "POST", "/generate", {"prompt": "hi"})


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    one.engine.script = echo
    with one.running():
        yield one


@pytest.mark.slow
async def test_1000_mutated_requests(server: Server) -> None:
    await fuzz(server, 1_000)


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_90000_mutated_requests(server: Server) -> None:
    """100,000 inputs together with tests/clients/test_fuzz.py."""
    await fuzz(server, 90_000)
