"""Server-sent events: how a frame is written, and the response that carries one generation to its end."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.gateway import Gateway
from serve_app.api.generation import answer, pulse, unless_gone
from serve_app.errors import ServeAppError
from serve_app.types import Chunk, GenerationRequest

# Legal inside JSON and inside SSE, but clients that split lines as Python's str.splitlines does would break there.
LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

DONE = b"data: [DONE]\n\n"


def data(document: object) -> bytes:
    """One frame. JSON escapes every line break that SSE knows."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text if text.isascii() else text.translate(LINE_BREAKS)}\n\n".encode()


def named(event: str, document: object) -> bytes:
    return f"event: {event}\n".encode() + data(document)


def comment(word: str) -> bytes:
    return f": {word}\n\n".encode()


class Frames(Protocol):
    """One dialect's frames for one generation."""

    def chunk(self, chunk: Chunk) -> bytes:
        """The frames of every event, and after a finish reason whatever ends the stream."""
        ...

    def failure(self, error: ServeAppError) -> bytes:
        """The frames that end the stream in an error."""
        ...


class EventStream(Response):
    """Streams one generation. An error before anything was sent is raised, and so keeps its own status.

    A model that stays silent for `every_s` seconds makes the response begin, or go on, with a comment:
    from then on errors travel in band.
    """

    media_type = "text/event-stream"

    def __init__(self, gateway: Gateway, request: GenerationRequest, frames: Frames, every_s: float) -> None:
        self.status_code = 200
        self.background = None
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        self.init_headers(headers)
        self._gateway = gateway
        self._request = request
        self._frames = frames
        self._every_s = every_s
        self._finished = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        async with aclosing(pulse(answer(self._gateway, self._request), self._every_s)) as beats:
            first = self._written(await anext(beats))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _write(send, first)
            await self._follow(beats, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, beats: AsyncGenerator[Chunk | None, None], send: Send) -> None:
        try:
            async for beat in beats:
                if not self._finished:  # nothing follows the terminal frame, no comment either
                    await _write(send, self._written(beat))
        except ServeAppError as error:
            self._gateway.refused(error, self._request.model)
            await _write(send, self._frames.failure(error))

    def _written(self, beat: Chunk | None) -> bytes:
        if beat is None:
            return comment(self._gateway.waiting_on(self._request.model))
        self._finished = beat.events[-1].finish_reason is not None
        return self._frames.chunk(beat)


async def _write(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
