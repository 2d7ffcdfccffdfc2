"""One computation of an answer that several equal requests follow (single flight)."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError, deadline_exceeded
from serve_app.gateway.answers import AnswerEncoder, replayed


class Flight:
    """Computes the answer to `request` in a task of its own, for the request itself and for equal ones.

    A follower gets the chunks so far at once and the others as they come; its own deadlines end only its own answer.
    The computation is cancelled when its last follower has left. Its own deadline is late enough for requests that
    arrive while it runs: one `timeout_s` after that of `request`. The chunks are kept until the flight ends, which
    takes no more memory than a stream with a client that does not read.

    Each chunk counts as computed for the first follower that takes it, and as replayed for the others, so that metrics
    and limits count it once.
    """

    def __init__(self, request: GenerationRequest, max_bytes: int) -> None:
        self._request = request
        self._deadline = request.deadline + request.timeout_s
        self._encoder = AnswerEncoder(max_bytes)
        self._chunks: list[Chunk] = []
        self._charged = 0
        self._followers = 0
        self._ended = self._abandoned = False
        self._error: Exception | None = None
        self._grown = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def takes(self, request: GenerationRequest) -> bool:
        """Whether an equal request can follow: not if the answer is too large to keep it for others."""
        failed = self._abandoned or self._error is not None
        return not failed and not self._encoder.too_large and request.deadline <= self._deadline

    def owned_by(self, task: asyncio.Task[None]) -> None:
        """Set the task that awaits `compute`. It is cancelled when the last follower has left."""
        self._task = task

    async def compute(self, engine: Engine) -> bytes | None:
        """Compute the answer. Returns it encoded; None if it is incomplete, failed, or is too large to store."""
        try:
            request = replace(self._request, deadline=self._deadline, first_token_deadline=None)
            async with aclosing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    self._chunks.append(chunk)
                    self._encoder.add(chunk)
                    self._wake()
        except asyncio.CancelledError:
            self._error = RuntimeError("the computation of the answer was cancelled")
            raise
        except Exception as error:  # noqa: BLE001 (every follower raises it)
            self._error = error
        finally:
            self._ended = True
            self._wake()
        complete = self._error is None and bool(self._chunks) and self._chunks[-1].finished
        return self._encoder.result() if complete else None

    async def follow(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """The chunks for a request, with times since its own arrival. Raises ServeAppError, or the engine's error."""
        joined_s = time.monotonic() - request.arrived
        offset_s = self._request.arrived - request.arrived
        self._followers += 1
        sent = 0
        try:
            while True:
                while sent < len(self._chunks):
                    chunk = self._chunks[sent]
                    sent += 1
                    yield self._for(request, chunk, sent, offset_s, joined_s)
                if self._ended:
                    break
                await self._growth(request, sent)
            if self._error is not None:
                raise _copied(self._error)
        finally:
            await self._leave()

    async def _growth(self, request: GenerationRequest, sent: int) -> None:
        deadline = request.deadline if sent else request.starts_by
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._grown.wait()
        except TimeoutError:
            raise deadline_exceeded(deadline - request.arrived) from None

    async def _leave(self) -> None:
        """The last follower ends the computation, and leaves when it has ended."""
        self._followers -= 1
        if self._followers == 0 and not self._ended:
            assert self._task is not None, "a flight has an owner before it has followers"
            self._abandoned = True
            self._task.cancel()
            await asyncio.wait([self._task])

    def _for(self, request: GenerationRequest, chunk: Chunk, sent: int, offset_s: float, joined_s: float) -> Chunk:
        """The chunk number `sent` for a follower. It counts as computed for the first one that takes it."""
        first = sent > self._charged
        self._charged = max(self._charged, sent)
        own = chunk if request is self._request else replayed(chunk, offset_s, joined_s)
        return own if own.replayed is not first else replace(own, replayed=not first)

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


def _copied(error: Exception) -> Exception:
    """An error for one follower. Each raises a copy, because an exception collects the traceback of every raise."""
    return copy.copy(error) if isinstance(error, ServeAppError) else error
