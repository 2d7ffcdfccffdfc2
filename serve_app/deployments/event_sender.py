"""Sends the events of all streams from a model replica to the ingresses: one connection each, one frame per flush."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from serve_app.deployments import wire
from serve_app.deployments.event_receiver import ReplyAddress

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
# If more bytes than this wait to be sent, the ingress is lost or does not read, and the connection is closed.
_MAX_UNSENT_BYTES = 64 * 2**20


class Source(Protocol):
    """A stream of events in the replica: engines.stream.TokenStream."""

    on_wake: Callable[[], None] | None

    @property
    def ended(self) -> bool: ...

    def take(self) -> wire.Item | None: ...


class EventSender:
    """The side of the replica: one connection to each ingress, opened with the first request from that ingress.

    Tokens after the first of a stream are gathered for `flush_interval_s` seconds.
    """

    def __init__(self, flush_interval_s: float) -> None:
        self._flush_interval_s = flush_interval_s
        self._connections: dict[ReplyAddress, Connection] = {}

    async def connection(self, address: ReplyAddress) -> Connection:
        """The open connection to an ingress. Raises OSError or TimeoutError if the ingress cannot be reached."""
        known = self._connections.get(address)
        if known is None or known.closed:
            known = self._connections[address] = Connection(self._flush_interval_s)
            self._forget_closed()
        await known.opened(address)
        return known

    def stop(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _forget_closed(self) -> None:
        self._connections = {address: one for address, one in self._connections.items() if not one.closed}


class Connection(asyncio.Protocol):
    """Sends the items of all its streams together: one frame for each flush.

    The first token and the end of a stream cause a flush in the same pass of the event loop. Other tokens wait until
    `flush_interval_s` seconds have passed since the last flush.
    """

    def __init__(self, flush_interval_s: float) -> None:
        self._flush_interval_s = flush_interval_s
        self._opening: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Source] = {}
        self._begun: set[int] = set()
        self._items: list[tuple[int, wire.Item]] = []
        self._flush_at = 0.0
        self._timer: asyncio.Handle | None = None
        self._urgent = False
        self.closed = False

    async def opened(self, address: ReplyAddress) -> None:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(address))
        await asyncio.shield(self._opening)

    def attach(self, number: int, stream: Source) -> None:
        """Send the items of a stream whenever it is woken, until it is detached."""
        self._streams[number] = stream
        stream.on_wake = lambda: self._woken(number, stream)

    def detach(self, number: int) -> None:
        self._streams.pop(number).on_wake = None
        self._begun.discard(number)

    def put(self, number: int, item: wire.Item) -> None:
        """Send an item of a stream at once. A closed connection drops the item, because its ingress is lost."""
        self._items.append((number, item))
        self._flush_soon()

    def flush(self) -> None:
        """Send the items of all streams in one frame."""
        self._cancel_timer()
        self._urgent = False
        items, self._items = self._items, []
        for number, stream in self._streams.items():
            while (item := stream.take()) is not None:
                items.append((number, item))
                self._begun.add(number)
        self._flush_at = asyncio.get_running_loop().time() + self._flush_interval_s
        self._send(items)

    def close(self) -> None:
        self.flush()
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    async def _open(self, address: ReplyAddress) -> None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                loop = asyncio.get_running_loop()
                self._transport, _ = await loop.create_connection(lambda: self, address.host, address.port)
        except (OSError, TimeoutError):
            self.closed = True
            raise
        self._transport.write(address.secret)

    def _woken(self, number: int, stream: Source) -> None:
        if stream.ended or number not in self._begun:
            self._flush_soon()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._flush_at, self.flush)

    def _flush_soon(self) -> None:
        """Flush after the engine has woken the other streams of the same step."""
        if not self._urgent:
            self._urgent = True
            self._cancel_timer()
            self._timer = asyncio.get_running_loop().call_soon(self.flush)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send(self, items: list[tuple[int, wire.Item]]) -> None:
        if self.closed or self._transport is None or not items:
            return
        self._transport.write(wire.pack(items))
        if self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            log.error("an ingress does not read its events; the connection was closed")
            with suppress(OSError):
                self._transport.abort()
            self.closed = True
