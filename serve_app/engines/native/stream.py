"""The way out: from the engine's thread to the event loop that serves one request."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import NamedTuple

from serve_app.core.events import Chunk, FinishReason, Logprobs, PromptDetails, TokenEvent
from serve_app.core.requests import GenerationRequest
from serve_app.engines.text.detokenizer import Decoder, Detokenizer
from serve_app.errors import InternalError, ServeAppError

logger = logging.getLogger(__name__)


class Token(NamedTuple):
    """A token as the model chose it, before it is text. Stop strings can still end the answer earlier.

    `complete` says that it ends an answer as the last of its text, not as a sign of its end. The first one brings what
    is `told` of the prompt.
    """

    token_id: int
    elapsed_s: float
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    complete: bool = False
    told: tuple[Logprobs, ...] | None = None


class Embedded(NamedTuple):
    """A prompt's embedding, which is all of the answer."""

    vector: tuple[float, ...]


class TokenStream:
    """One request's tokens on their way to its consumer.

    The engine's thread calls `put` and `fail`, then wakes all streams of a step at once. Everything else happens on
    the event loop that made the stream: `wake` makes text of the tokens and looks for stop strings, so that the model
    waits for neither; the consumer reads `chunks` and calls `close`. The engine looks at `closed` before every step,
    so that whoever leaves, or met a stop string, has its slot freed before the next one. What waits here is bounded
    by the request's own max_tokens.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.arrived = request.arrived
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.started: float | None = None
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self._detokenizer: Detokenizer | None = None
        self._told: deque[Token | Embedded | ServeAppError] = deque()
        self._prompt: PromptDetails | None = None
        self._embedding: tuple[float, ...] | None = None
        self._tokens = 0
        self._events: list[TokenEvent] = []
        self._error: ServeAppError | None = None
        self._ended = False
        self._arrival = asyncio.Event()
        self._end = asyncio.Event()

    def open(self, prompt_tokens: int, decoder: Decoder, prompt: PromptDetails | None = None) -> None:
        """At admission, before any token: what its prompt comes to, and how its answer becomes text."""
        self.prompt_tokens = prompt_tokens
        self._prompt = prompt
        params = self.request.params
        self._detokenizer = Detokenizer(decoder, params.stop, params.include_stop_str_in_output)

    def put(self, told: Token | Embedded) -> None:
        self._told.append(told)

    def fail(self, error: ServeAppError) -> None:
        self._told.append(error)

    def wake(self) -> None:
        """On the event loop only: take in what the engine told, and let the consumer look."""
        while self._told and not self._ended:
            self._take_in(self._told.popleft())
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
            if self._events or self._embedding is not None:
                yield self._take()
                flush_at = loop.time() + flush_interval_s
            if self._ended and not self._events:
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

    def _take_in(self, told: Token | Embedded | ServeAppError) -> None:
        if isinstance(told, ServeAppError):
            self._error, self._ended = told, True
            return
        if isinstance(told, Embedded):
            self._embedding, self._ended = told.vector, True
            return
        if told.told is not None:
            self._prompt = replace(self._prompt or PromptDetails(), logprobs=told.told)
        try:
            event = self._event(told)
        except Exception:
            logger.exception("no text can be made of the answer to request %s", self.request.id)
            self._error = InternalError("the answer could not be turned into text")
            self._ended = self.closed = True
            return
        self._events.append(event)
        self._ended = event.finish_reason is not None

    def _event(self, token: Token) -> TokenEvent:
        assert self._detokenizer is not None, "a stream is opened before its first token"
        self._tokens += 1
        params, text, reason = self.request.params, "", token.finish_reason
        is_sign = reason is FinishReason.STOP and not token.complete
        stopped_by: str | int | None = token.token_id if is_sign and token.token_id in params.stop_token_ids else None
        # Of a token that is a sign of the end nothing is shown, unless asked for.
        if not is_sign or params.include_stop_str_in_output:
            text, met = self._detokenizer.push(token.token_id, self._tokens >= params.min_tokens)
            if met is not None:
                reason, stopped_by = FinishReason.STOP, met
                self.closed = True
        if reason is not None:
            text += self._detokenizer.flush()
        return TokenEvent(token.token_id, text, token.elapsed_s, reason, token.logprobs, stopped_by)

    def _take(self) -> Chunk:
        events, self._events = tuple(self._events), []
        prompt, self._prompt = self._prompt, None
        embedding, self._embedding = self._embedding, None
        started = self.arrived if self.started is None else self.started
        return Chunk(events, self.prompt_tokens, started - self.arrived, self.cached_tokens, prompt, embedding)


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
