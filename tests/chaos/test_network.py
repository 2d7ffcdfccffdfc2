"""The proxy of faults passes on what it must, and the service frees what its broken connections held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.chaos.load import LENGTHS, stream, undisturbed
from tests.chaos.network import Link
from tests.graph.service import Service, wait_until, wait_until_idle
from tests.graph.streams import toy_calls

CONTENT = bytes(range(256)) * 400


@asynccontextmanager
async def echo(**options: float) -> AsyncIterator[tuple[Link, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A server that sends back what it gets and then the end, and a connection to it through a link."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(1000):
                writer.write(part)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Link(server.sockets[0].getsockname()[1], **options) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        try:
            yield link, reader, writer
        finally:
            writer.close()


async def test_a_link_passes_all_bytes_and_the_end() -> None:
    async with echo() as (link, reader, writer):
        writer.write(CONTENT)
        writer.write_eof()
        assert await reader.read() == CONTENT

        async def closed() -> bool:
            return not link.connections

        await wait_until(closed)


async def test_a_link_delays_both_directions() -> None:
    async with echo(delay_s=0.05) as (_, reader, writer):
        began = time.monotonic()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        assert 0.1 <= time.monotonic() - began < 1


async def test_a_link_has_a_bandwidth() -> None:
    async with echo(bytes_per_s=1_000_000) as (_, reader, writer):
        began = time.monotonic()
        writer.write(CONTENT)
        assert await reader.readexactly(len(CONTENT)) == CONTENT
        assert 0.1 <= time.monotonic() - began < 2, "100 kB in each direction"


async def test_a_link_that_drops_ends_nothing_and_passes_all_later() -> None:
    async with echo() as (link, reader, writer):
        link.drop()
        writer.write(b"x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.1)
        link.restore()
        assert await reader.readexactly(1) == b"x"


async def test_a_link_resets_its_connections() -> None:
    async with echo() as (link, reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        link.reset()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


async def test_a_link_half_closes_the_side_of_the_client() -> None:
    """The server gets the end. What it sent before still arrives."""
    async with echo() as (link, reader, writer):
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        link.half_close()
        assert await reader.read() == b""


def test_a_link_to_a_closed_port_resets() -> None:
    async def connect() -> None:
        async with Link(1) as link:
            reader, _ = await asyncio.open_connection("127.0.0.1", link.port)
            await reader.readexactly(1)

    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        asyncio.run(connect())


@pytest.mark.ray
async def test_streams_whose_network_is_cut_leave_nothing_behind(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    """Of all dialects: reset, half-closed, or without a network for 0.3 s. The last ones get their whole answers."""
    expected = await undisturbed(client)
    async with Link(toy_service.port) as link, httpx.AsyncClient(base_url=link.url) as behind:

        async def cut(method: str, tokens: int) -> set[str]:
            streams = [stream(behind, call, expected.get((call.path, tokens))) for call in toy_calls(tokens)]
            tasks = [asyncio.ensure_future(one) for one in streams]
            await asyncio.sleep(0.3)
            getattr(link, method)()
            await asyncio.sleep(0.3)
            link.restore()
            return {one.kind for one in await asyncio.gather(*tasks)}

        # 10 s each; another number of tokens, so that no answer is in the response cache.
        assert await cut("reset", 1000) == {"broken"}
        # HAProxy takes a client that has ended its side as one that has left (`option abortonclose`).
        assert await cut("half_close", 1001) == {"broken"}
        assert await cut("drop", LENGTHS[-1]) == {"answered"}
    await wait_until_idle(client, "toy")
