"""Encodes the chunks and errors of any number of streams as one frame from a model replica to an ingress.

A frame is a 4-byte length (big endian) and a msgpack list of `[stream, is_chunk, fields]`. In contrast to pickle,
reading a frame executes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import msgpack

from serve_app.core import packing
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InternalError, ServeAppError

LENGTH: Final = struct.Struct(">I")
# Far above the largest frame of one request: 65,536 log probabilities of a prompt, each with the text of its token.
MAX_FRAME_BYTES: Final = 64 * 2**20

Item = Chunk | ServeAppError


class Packed(NamedTuple):
    """An item of a frame that has not been decoded yet."""

    stream: int
    is_chunk: bool
    fields: list[Any]

    @property
    def elapsed_s(self) -> float | None:
        """The time of the last token since the arrival of the request; None for an item without tokens."""
        return packing.last_elapsed_s(self.fields) if self.is_chunk else None


_ERRORS: Final = {kind.code: kind for kind in ServeAppError.__subclasses__()}


def pack(items: Iterable[tuple[int, Item]]) -> bytes:
    """A frame with its length. Each item has the number of its stream."""
    body: bytes = msgpack.packb([[stream, *_packed(item)] for stream, item in items], unicode_errors="surrogatepass")
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> list[Packed]:
    """The items of a frame, which is given without its length. Raises ValueError for bytes that are not a frame."""
    try:
        items = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogatepass")
        return [Packed(*item) for item in items]
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a frame of chunks: {error}") from None


def compact(packed: Packed) -> bytes:
    """An item as bytes, for `expanded`."""
    body: bytes = msgpack.packb(list(packed), unicode_errors="surrogatepass")
    return body


def expanded(body: bytes) -> Packed:
    """The item that `compact` has made."""
    return Packed(*msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogatepass"))


def decode(packed: Packed, offset_s: float = 0.0) -> Item:
    """The item. `offset_s` is added to its times, which are relative to the arrival of the request."""
    if not packed.is_chunk:
        code, *arguments = packed.fields
        return _ERRORS.get(code, InternalError)(*arguments)
    return packing.unpacked(packed.fields, offset_s)


def outgoing(request: GenerationRequest, now: float) -> GenerationRequest:
    """The request with instants relative to `now`, for a process whose clock has another origin.

    Without the deadline of the first token, which the ingress watches.
    """
    return replace(request, arrived=request.arrived - now, deadline=request.deadline - now, first_token_deadline=None)


def incoming(request: GenerationRequest, now: float) -> GenerationRequest:
    """The inverse of `outgoing`, in the process that received the request at `now`."""
    return replace(request, arrived=request.arrived + now, deadline=request.deadline + now)


def _packed(item: Item) -> tuple[bool, list[Any]]:
    if isinstance(item, ServeAppError):
        return False, [item.code, *item.args]
    return True, packing.packed(item)
