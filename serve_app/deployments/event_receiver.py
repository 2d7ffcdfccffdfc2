"""Receives the events of all streams in an ingress, over one TCP connection from each model replica.

The ingress listens on its node's address and sends that address with a secret in each request. A replica opens one
connection to each ingress from which it has received a request. The ingress closes a connection that does not begin
with the secret.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import NamedTuple, cast

from serve_app.deployments import wire
from serve_app.errors import NotReady

log = logging.getLogger(__name__)

_SECRET_BYTES = 32
_DECODED = 32


class ReplyAddress(NamedTuple):
    """The address at which an ingress receives events, and the secret with which a connection must begin."""

    host: str
    port: int
    secret: bytes


@dataclass(slots=True)
class Inbox:
    """The items of one stream that have been received and not yet been read. A closed inbox has no reader.

    Items behind the first `_DECODED` wait as bytes, which take less memory, for a client that does not read.
    """

    arrived: float
    items: deque[wire.Item | bytes] = field(default_factory=deque)
    offset_s: float | None = None
    connection: asyncio.Transport | None = None
    closed: bool = False
    lost: bool = False
    _filled: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: wire.Item | bytes) -> None:
        self.items.append(item)
        self._filled.set()

    def lose(self) -> None:
        """End the stream with an error, because its replica was lost."""
        self.lost = True
        self.put(replica_lost())

    def take_in(self, packed: wire.Packed, connection: asyncio.Transport) -> None:
        """Decode an item and add it. The first token sets the offset between the replica's times and ours."""
        self.connection = connection
        if self.offset_s is None and packed.elapsed_s is not None:
            self.offset_s = max(0.0, time.monotonic() - self.arrived - packed.elapsed_s)
        self.put(self._decoded(packed) if len(self.items) < _DECODED else wire.compact(packed))

    async def get(self) -> wire.Item:
        while not self.items:
            self._filled.clear()
            await self._filled.wait()
        item = self.items.popleft()
        return self._decoded(wire.expanded(item)) if isinstance(item, bytes) else item

    def _decoded(self, packed: wire.Packed) -> wire.Item:
        return wire.decode(packed, self.offset_s or 0.0)


class EventReceiver:
    """The side of the ingress: puts the items of all connections into the inboxes of their streams."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._numbers = 0
        self._inboxes: dict[int, Inbox] = {}
        self._server: asyncio.Server | None = None
        self.address = ReplyAddress(host, 0, self._secret)

    async def start(self) -> None:
        """Listen on a free port of the host."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Receiving(self), self._host, 0)
        self.address = ReplyAddress(self._host, self._server.sockets[0].getsockname()[1], self._secret)

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    def open(self, arrived: float) -> tuple[int, Inbox]:
        """The number and the inbox of a new stream. `arrived` is the instant at which its request arrived."""
        self._numbers += 1
        inbox = self._inboxes[self._numbers] = Inbox(arrived)
        return self._numbers, inbox

    def close(self, number: int) -> None:
        self._inboxes.pop(number).closed = True

    def authentic(self, secret: bytes) -> bool:
        return compare_digest(secret, self._secret)

    def received(self, items: list[wire.Packed], connection: asyncio.Transport) -> None:
        for packed in items:
            inbox = self._inboxes.get(packed.stream)
            if inbox is not None:  # otherwise the client has disconnected
                inbox.take_in(packed, connection)

    def lost(self, connection: asyncio.Transport) -> None:
        for inbox in self._inboxes.values():
            if inbox.connection is connection:
                inbox.lose()


def replica_lost() -> NotReady:
    return NotReady("The replica that served this request was lost. Send the request again.", retry_after_s=1)


class _Receiving(asyncio.Protocol):
    """One connection from a replica: the secret, then frames."""

    def __init__(self, receiver: EventReceiver) -> None:
        self._receiver = receiver
        self._buffer = bytearray()
        self._known = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport is not a subclass

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._known and not self._authenticate():
            return
        at = 0
        while (end := self._end(at)) is not None:
            self._take(bytes(self._buffer[at + wire.LENGTH.size : end]))
            at = end
        del self._buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.lost(self._transport)

    def _authenticate(self) -> bool:
        if len(self._buffer) < _SECRET_BYTES:
            return False
        self._known = self._receiver.authentic(bytes(self._buffer[:_SECRET_BYTES]))
        del self._buffer[:_SECRET_BYTES]
        if not self._known:
            log.warning("a connection for events did not begin with the secret and was closed")
            self._transport.abort()
        return self._known

    def _end(self, at: int) -> int | None:
        """The end of the frame that begins at `at`; None while the frame is not complete."""
        if len(self._buffer) < at + wire.LENGTH.size:
            return None
        (length,) = wire.LENGTH.unpack_from(self._buffer, at)
        if length > wire.MAX_FRAME_BYTES:
            log.error("a replica sent a frame of %d bytes; its connection was closed", length)
            self._transport.abort()
            return None
        end: int = at + wire.LENGTH.size + length
        return end if len(self._buffer) >= end else None

    def _take(self, body: bytes) -> None:
        try:
            self._receiver.received(wire.unpack(body), self._transport)
        except ValueError:
            log.exception("a replica sent a frame that cannot be read; its connection was closed")
            self._transport.abort()
