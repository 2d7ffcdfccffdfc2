"""Decodes request bodies that clients have compressed with gzip or zstd."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import Limits
from serve_app.errors import BodyTooLarge, InvalidRequest, UnsupportedEncoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# The largest window of the content coding zstd is 8 MB (RFC 9659).
_ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
# Members of gzip, or frames of zstd, of one body. To read each of them costs a copy of the rest of the body.
_MAX_MEMBERS = 64


class _Decompressor(Protocol):
    """Decodes one member of gzip, or one frame of zstd."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": partial(zlib.decompressobj, _GZIP_WINDOW),
    "zstd": partial(zstd.ZstdDecompressor, options=_ZSTD),
}
ACCEPTED = ", ".join(_DECOMPRESSORS)
_ALIASES = {"x-gzip": "gzip"}


class DecodeBody:
    """Decodes the body by its `content-encoding`. Never holds more than `max_body_bytes` of the decoded body.

    Errors are raised from `receive`, so that the route's error handlers answer with them: UnsupportedEncoding, before
    any part of the body is taken, BodyTooLarge, and InvalidRequest for data that are not in the coding.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        codings = _codings(Headers(scope=scope)) if scope["type"] == "http" else []
        if not codings:
            await self.app(scope, receive, send)
            return
        decoder: _Decoder | None = None
        complete = False

        async def decoded_receive() -> Message:
            nonlocal decoder, complete
            if complete:
                return await receive()
            decoder = decoder or _Decoder(codings, self.limits.max_body_bytes)
            message = await receive()
            if message["type"] != "http.request":
                return message
            complete = not message.get("more_body", False)
            return {**message, "body": decoder.decode(message.get("body", b""), complete)}

        async def send_accepted(message: Message) -> None:
            if message.get("status") == UnsupportedEncoding.status:
                MutableHeaders(scope=message)["accept-encoding"] = ACCEPTED
            await send(message)

        await self.app(scope, decoded_receive, send_accepted)


def _codings(headers: Headers) -> list[str]:
    """The codings of a body in the order in which they were applied, without `identity`."""
    names = re.split(r"[,\s]+", ",".join(headers.getlist("content-encoding")).lower())
    return [_ALIASES.get(name, name) for name in names if name not in ("", "identity")]


class _Decoder:
    """Decodes a body that arrives in parts. Raises UnsupportedEncoding if it has another coding, or several."""

    def __init__(self, codings: list[str], limit: int) -> None:
        self._coding = ", ".join(codings)
        if self._coding not in _DECOMPRESSORS:
            raise UnsupportedEncoding(
                f"Content-Encoding {self._coding[:64]!r} is not supported. Use one of {ACCEPTED}, or send "
                "the body as it is."
            )
        self._limit = self._room = limit
        self._members = 1
        self._member = _DECOMPRESSORS[self._coding]()

    def decode(self, data: bytes, last: bool) -> bytes:
        """The decoded part. `last` is whether the body ends with it. Raises BodyTooLarge, InvalidRequest."""
        parts = []
        while data:
            if self._member.eof:
                self._begin_member()
            parts.append(self._decompress(data))
            data = self._member.unused_data
        if last and not self._member.eof:
            raise InvalidRequest(f"The body ends in the middle of its {self._coding} data. Send all of the data.")
        return b"".join(parts)

    def _begin_member(self) -> None:
        self._members += 1
        if self._members > _MAX_MEMBERS:
            raise InvalidRequest(f"The {self._coding} data has more than {_MAX_MEMBERS} parts. Compress it as one.")
        self._member = _DECOMPRESSORS[self._coding]()

    def _decompress(self, data: bytes) -> bytes:
        try:
            part = self._member.decompress(data, self._room + 1)
        except (zlib.error, zstd.ZstdError):
            raise InvalidRequest(
                f"The body is not {self._coding} data, but its header content-encoding says so. Remove the header, or "
                "compress the body."
            ) from None
        self._room -= len(part)
        if self._room < 0:
            raise BodyTooLarge(
                f"The decoded body is larger than {self._limit} bytes. Send a shorter prompt or fewer items."
            )
        return part
