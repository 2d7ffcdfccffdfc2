"""A TCP proxy between clients and the service: it delays, slows, drops, resets and half-closes connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Self

_PART = 16_384
# With this option, close() resets the connection: the other side gets an error instead of an end.
RESET = struct.pack("ii", 1, 0)


class Link:
    """Listens on a free port of 127.0.0.1 and forwards to `port`. All bytes pass until a method changes that.

    `delay_s` is added to every part in both directions, `bytes_per_s` limits each direction of each connection, and
    while `dropping`, nothing passes and nothing ends, as without a network.
    """

    def __init__(self, port: int, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self._target = port
        self._open = asyncio.Event()
        self._open.set()
        self._pairs: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.restore()
        self.reset()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def drop(self) -> None:
        """From now on no byte and no end of a connection passes, until `restore`."""
        self._open.clear()

    def restore(self) -> None:
        self._open.set()

    def reset(self) -> None:
        """Reset all connections on both sides."""
        for pair in self._pairs.values():
            for writer in pair:
                _reset(writer)

    def half_close(self) -> None:
        """End the direction from the clients to the service. The other one stays open."""
        for _, service in self._pairs.values():
            with suppress(OSError, RuntimeError):
                service.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            answers, service = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(client)
            return
        self._pairs[task] = client, service
        try:
            await asyncio.gather(self._pass(reader, service), self._pass(answers, client))
        except OSError:  # one side was reset
            _reset(client)
            _reset(service)
        finally:
            client.close()
            service.close()
            del self._pairs[task]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one direction to its end, and the end."""
        while part := await reader.read(_PART):
            await asyncio.sleep(self.delay_s + (len(part) / self.bytes_per_s if self.bytes_per_s else 0))
            await self._open.wait()
            writer.write(part)
            await writer.drain()
        await self._open.wait()
        with suppress(OSError, RuntimeError):  # closed already
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
