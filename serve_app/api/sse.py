"""Server-sent events: how a frame is written, and the response that carries one generation to its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.gateway import Gateway
from serve_app.api.generation import answer, side_by_side, stop, unless_gone
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

# Legal inside JSON and inside SSE, but clients that split lines as Python's str.splitlines does would break there.
LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

DONE = b"data: [DONE]\n\n"
UNREAD_S = 10.0  # a request that is out of time is told so in band; this is how long that may lie unread


def data(document: object) -> bytes:
    """One frame. JSON escapes every line break that SSE knows."""
    text = _JSON.encode(document)
    return f"data: {text if text.isascii() else text.translate(LINE_BREAKS)}\n\n".encode()


def named(event: str, document: object) -> bytes:
    return f"event: {event}\n".encode() + data(document)


def comment(word: str) -> bytes:
    return f": {word}\n\n".encode()


class Frames(Protocol):
    """One dialect's frames for the answers to one call."""

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        """The frames of every event of answer `index`."""
        ...

    def end(self) -> bytes:
        """What ends the stream after the last token of every answer."""
        ...

    def failure(self, error: ServeAppError) -> bytes:
        """The frames that end the stream in an error."""
        ...


class EventStream(Response):
    """Streams the answers to one call as they come.

    An error before anything was sent is raised, and so keeps its own status.
    A model that stays silent for `every_s` seconds makes the response begin, or go on, with a comment:
    from then on errors travel in band.
    """

    media_type = "text/event-stream"

    def __init__(self, gateway: Gateway, requests: Sequence[GenerationRequest], frames: Frames, every_s: float) -> None:
        self.status_code = 200
        self.background = None
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        self.init_headers(headers)
        self._gateway = gateway
        self._requests = requests
        self._frames = frames
        self._unfinished = len(requests)
        self._every_s = every_s
        self._started = False
        self._wrote_at = 0.0
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientDisconnect, also of a client that does not read: it holds its place as long as others may."""
        limit = max(request.deadline for request in self._requests) + UNREAD_S - time.monotonic()
        try:
            async with asyncio.timeout(limit) as clock:
                await unless_gone(receive, self._run(send))
        except TimeoutError:
            if not clock.expired():
                raise
            raise ClientDisconnect from None

    def chunks(self, index: int) -> AsyncGenerator[Chunk, None]:
        """The tokens of answer `index`."""
        return answer(self._gateway, self._requests[index])

    async def _run(self, send: Send) -> None:
        self._wrote_at = asyncio.get_running_loop().time()
        pulse = asyncio.create_task(self._pulse(send))
        try:
            await self._answer(send)
        finally:
            await stop(pulse)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, send: Send) -> None:
        try:
            await side_by_side(partial(self._follow, send, index) for index in range(len(self._requests)))
        except ServeAppError as error:
            if not self._started:
                raise
            self._unfinished = 0
            self._gateway.refused(error, self._requests[0].model)
            await self._write(send, self._frames.failure(error))

    async def _follow(self, send: Send, index: int) -> None:
        async with aclosing(self.chunks(index)) as chunks:
            async for chunk in chunks:
                frames = self._frames.chunk(chunk, index)
                self._unfinished -= chunk.finished
                frames += b"" if self._unfinished else self._frames.end()
                if frames:
                    await self._write(send, frames)

    async def _pulse(self, send: Send) -> None:
        """A comment whenever nothing was written for `every_s`; nothing follows the terminal frame."""
        loop = asyncio.get_running_loop()
        while self._unfinished:
            silence_s = loop.time() - self._wrote_at
            if silence_s < self._every_s:
                await asyncio.sleep(self._every_s - silence_s)
            else:
                await self._write(send, comment(self._gateway.waiting_on(self._requests[0].model)))

    async def _write(self, send: Send, body: bytes) -> None:
        async with self._writing:  # the start comes first, whoever writes
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._wrote_at = asyncio.get_running_loop().time()
