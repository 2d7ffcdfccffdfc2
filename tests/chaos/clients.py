"""Clients that harm: they never read, read slowly, crash, or send what cannot be read."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, Self

from tests.chaos.network import RESET

# The smallest receive buffer that Linux grants. What a client does not read stays on the side of the service.
_SMALL_BUFFER = 2304


class RawClient:
    """One connection with one request, whose answer is read only as far as a method says."""

    def __init__(self, port: int, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
        lines += [f"content-length: {len(content)}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        self._request = "\r\n".join([*lines, "\r\n"]).encode() + content
        self._port = port
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        self._socket.setblocking(False)

    async def __aenter__(self) -> Self:
        """Send the request."""
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        await loop.sock_sendall(self._socket, self._request)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._socket.close()

    async def read(self, count: int = 65_536) -> bytes:
        """At most `count` bytes; none at the end. Raises ConnectionError."""
        return await asyncio.get_running_loop().sock_recv(self._socket, count)

    async def read_slowly(self, bytes_per_s: float) -> bytes:
        """Read to the end of the connection."""
        content, part = b"", max(1, int(bytes_per_s / 10))
        while found := await self.read(part):
            content += found
            await asyncio.sleep(0.1)
        return content

    def crash(self) -> None:
        """Reset the connection, as the system of a client does that has crashed."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._socket.close()
