"""Encodes answers for the response cache, replays them, and keeps them in memory up to a size and an age (LRU)."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Protocol

import msgpack

from serve_app.core.events import Chunk
from serve_app.core.packing import packed_without_times, unpacked
from serve_app.core.requests import GenerationRequest

# Bytes of memory of an entry besides its answer: key, objects, and its place in the dictionary.
_ENTRY_BYTES = 300


class AnswerStore(Protocol):
    """Keeps encoded answers by their keys. No method raises, and none waits long."""

    async def get(self, key: bytes) -> bytes | None:
        """The answer; None if it is not there or cannot be read."""
        ...

    async def put(self, key: bytes, answer: bytes) -> None:
        """Keep an answer, if there is room for it."""
        ...

    async def close(self) -> None: ...


class AnswerEncoder:
    """Encodes the chunks of one answer as msgpack, one after the other. An answer above `max_bytes` is given up."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._packer = msgpack.Packer(unicode_errors="surrogatepass")
        self._encoded = bytearray()
        self.too_large = False

    def add(self, chunk: Chunk) -> None:
        if not self.too_large:
            self._encoded += self._packer.pack(packed_without_times(chunk))
            self.too_large = len(self._encoded) > self._max_bytes

    def result(self) -> bytes | None:
        return None if self.too_large else bytes(self._encoded)


async def replay(answer: bytes, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stored answer, with the times of now. Other tasks run between them."""
    unpacker = msgpack.Unpacker(unicode_errors="surrogatepass", strict_map_key=False, max_buffer_size=len(answer))
    unpacker.feed(answer)
    began_s = time.monotonic() - request.arrived
    for fields in unpacker:
        yield replace(unpacked(fields, began_s), replayed=True)
        await asyncio.sleep(0)


def replayed(chunk: Chunk, offset_s: float, earliest_s: float) -> Chunk:
    """A chunk for another request: its times move by `offset_s`, but not before `earliest_s`."""
    return replace(
        chunk,
        events=tuple([replace(event, elapsed_s=max(event.elapsed_s + offset_s, earliest_s)) for event in chunk.events]),
        queue_s=max(chunk.queue_s + offset_s, earliest_s),
        replayed=True,
    )


class MemoryStore:
    """Keeps up to `max_bytes` of answers for `ttl_s` seconds each. `report` gets the bytes after each change."""

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        report: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._report = report
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # expiry and answer; oldest use first
        self._bytes = 0

    async def get(self, key: bytes) -> bytes | None:
        found = self._entries.get(key)
        if found is None:
            return None
        expiry, answer = found
        if self._clock() >= expiry:
            self._remove(key)
            self._report(self._bytes)
            return None
        self._entries.move_to_end(key)
        return answer

    async def put(self, key: bytes, answer: bytes) -> None:
        size = len(answer) + _ENTRY_BYTES
        if size > self._max_bytes:
            return
        if key in self._entries:
            self._remove(key)
        while self._bytes + size > self._max_bytes:
            self._remove(next(iter(self._entries)))
        self._entries[key] = (self._clock() + self._ttl_s, answer)
        self._bytes += size
        self._report(self._bytes)

    async def close(self) -> None:
        """Nothing to close."""

    def _remove(self, key: bytes) -> None:
        self._bytes -= len(self._entries.pop(key)[1]) + _ENTRY_BYTES
