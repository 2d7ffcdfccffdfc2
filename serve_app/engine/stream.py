"""The way out: from the engine's thread to the event loop that serves one request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from serve_app.errors import ServeAppError
from serve_app.types import Chunk, GenerationRequest, TokenEvent


class TokenStream:
    """One request's tokens on their way to its consumer.

    The engine's thread calls `put` and `fail`, then wakes all streams of a step at once; the
    event loop that made the stream reads `chunks` and calls `close`. The engine looks at `closed`
    before every step, so a consumer that leaves has its slot freed before the next one. What waits
    here is bounded by the request's own max_tokens.
    """

    def __init__(self, request: GenerationRequest, arrived: float) -> None:
        self.request = request
        self.arrived = arrived
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.started: float | None = None
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self._events: deque[TokenEvent] = deque()
        self._error: ServeAppError | None = None
        self._ended = False
        self._arrival = asyncio.Event()
        self._end = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._ended = self._ended or event.finish_reason is not None

    def fail(self, error: ServeAppError) -> None:
        self._error = error
        self._ended = True

    def wake(self) -> None:
        """On the event loop only: let the consumer look."""
        self._arrival.set()
        if self._ended:
            self._end.set()

    def close(self) -> None:
        self.closed = True

    async def chunks(self, flush_interval_s: float) -> AsyncGenerator[Chunk, None]:
        """Yield what has arrived: the first token at once, later ones gathered for `flush_interval_s`.

        Raises the ServeAppError that ended the request, after the tokens that came before it.
        """
        loop = self.loop
        flush_at = loop.time()
        while True:
            await self._arrival.wait()
            await self._gather(flush_at - loop.time())
            self._arrival.clear()
            ended = self._ended  # read before the events: nothing is put after the end
            if self._events:
                yield self._take()
                flush_at = loop.time() + flush_interval_s
            if ended:
                if self._error is not None:
                    raise self._error
                return

    async def _gather(self, seconds: float) -> None:
        if seconds > 0 and not self._ended:
            try:
                async with asyncio.timeout(seconds):
                    await self._end.wait()
            except TimeoutError:
                pass

    def _take(self) -> Chunk:
        events = tuple(self._events.popleft() for _ in range(len(self._events)))
        started = self.arrived if self.started is None else self.started
        return Chunk(events, self.prompt_tokens, started - self.arrived, self.cached_tokens)


def wake_all(streams: Iterable[TokenStream]) -> None:
    """Wake the consumers of a step: one call into each event loop, whatever the number of streams."""
    by_loop: dict[asyncio.AbstractEventLoop, list[TokenStream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, members in by_loop.items():
        try:
            loop.call_soon_threadsafe(_wake_each, members)
        except RuntimeError:
            # The loop is closed: its consumers are gone, and nobody is left to tell.
            for stream in members:
                stream.close()


def _wake_each(streams: list[TokenStream]) -> None:
    for stream in streams:
        stream.wake()
