"""Carries the tokens of one request from the engine's thread to the event loop that serves the request."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from serve_app.core.events import Chunk, Delta, FinishReason, Logprobs, PromptDetails, TokenEvent
from serve_app.core.requests import GenerationRequest
from serve_app.engines.adapters import LoadedAdapter
from serve_app.engines.text.detokenizer import Detokenizer
from serve_app.engines.text.protocol import AnswerParser, AnswerPlan, Decoder
from serve_app.errors import InternalError, ServeAppError

logger = logging.getLogger(__name__)


class Token(NamedTuple):
    """A sampled token before detokenization. A stop string can still end the answer earlier.

    `complete` is set if the answer ends with this token because its grammar is complete: the token is text and no end
    token. The first token carries the `prompt_logprobs`.
    """

    token_id: int
    elapsed_s: float
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    complete: bool = False
    prompt_logprobs: tuple[Logprobs, ...] | None = None


class Embedding(NamedTuple):
    """The embedding of a prompt: the whole result of its request."""

    vector: tuple[float, ...]


class TokenStream:
    """The tokens of one request on their way to its consumer.

    The engine's thread calls `put` and `fail`, then wakes all streams of a step together. The event loop that created
    the stream does everything else, so that the model does not wait for it: `wake` detokenizes, looks for stop strings
    and divides the answer; the consumer reads `chunks`, or calls `take` when `on_wake` was called, and calls `close`.
    The native engine reads `closed` before every step and frees the slot of a stream whose consumer left or that met a
    stop string; vLLM's sets `on_close`, which `close` calls. The LoRA `adapter` is set before admission, and `close`
    releases it. The request's max_tokens bounds the number of tokens that wait here.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.on_wake: Callable[[], None] | None = None
        self.on_close: Callable[[], object] | None = None
        self.params = request.params
        self.arrived = request.arrived
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.started: float | None = None
        self.adapter: LoadedAdapter | None = None
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self._detokenizer: Detokenizer | None = None
        self._parser: AnswerParser | None = None
        self._stop_texts: Mapping[int, str] = {}
        self._received: deque[Token | Embedding | ServeAppError] = deque()
        self._prompt: PromptDetails | None = None
        self._embedding: tuple[float, ...] | None = None
        self._tokens = 0
        self._events: list[TokenEvent] = []
        self._error: ServeAppError | None = None
        self._ended = False
        self._ready = asyncio.Event()
        self._end = asyncio.Event()

    def open(
        self,
        prompt_tokens: int,
        decoder: Decoder,
        plan: AnswerPlan,
        prompt: PromptDetails | None = None,
    ) -> None:
        """Set at admission, before any token, what turns the tokens into events."""
        self.prompt_tokens = prompt_tokens
        self._prompt = prompt
        self.params, self._parser, self._stop_texts = plan.params, plan.parser, plan.stop_texts
        self._detokenizer = Detokenizer(decoder, self.params.stop, self.params.include_stop_str_in_output)
        for token_id in self.request.resumed:
            self._make_event(Token(token_id, 0.0))  # its text was sent before; what is held back is still to be sent

    def put(self, result: Token | Embedding) -> None:
        self._received.append(result)

    def fail(self, error: ServeAppError) -> None:
        self._received.append(error)

    def wake(self) -> None:
        """Process what the engine sent and let the consumer continue. Called on the event loop only."""
        while self._received and not self._ended:
            self._process(self._received.popleft())
        self._ready.set()
        if self._ended:
            self._end.set()
        if self.on_wake is not None:
            self.on_wake()

    def close(self) -> None:
        if self.adapter is not None and not self.closed:
            self.adapter.release()
        self.closed = True
        if self.on_close is not None:
            self.on_close()

    @property
    def ended(self) -> bool:
        """Whether the last event, or the error that ends the request, has been processed."""
        return self._ended

    async def wait_ended(self) -> None:
        await self._end.wait()

    def take(self) -> Chunk | ServeAppError | None:
        """What was processed since the last call: a chunk; after the last chunk the error that ended the request."""
        if self._events or self._embedding is not None:
            return self._take_chunk()
        error, self._error = self._error, None
        return error

    async def chunks(self, flush_interval_s: float) -> AsyncGenerator[Chunk, None]:
        """Yield the first token at once, and later tokens gathered for `flush_interval_s` seconds.

        Raises the ServeAppError that ended the request, after the tokens that came before it.
        """
        loop = self.loop
        flush_at = loop.time()
        while True:
            await self._ready.wait()
            await self._gather(flush_at - loop.time())
            self._ready.clear()
            item = self.take()
            if isinstance(item, Chunk):
                yield item
                flush_at = loop.time() + flush_interval_s
                item = self.take() if self._ended and not self._events else None
            if isinstance(item, ServeAppError):
                raise item
            if self._ended and not self._events:
                return

    async def _gather(self, seconds: float) -> None:
        if seconds > 0 and not self._ended:
            try:
                async with asyncio.timeout(seconds):
                    await self._end.wait()
            except TimeoutError:
                pass

    def _process(self, result: Token | Embedding | ServeAppError) -> None:
        if isinstance(result, ServeAppError):
            self._error, self._ended = result, True
            return
        if isinstance(result, Embedding):
            self._embedding, self._ended = result.vector, True
            return
        if result.prompt_logprobs is not None:
            self._prompt = replace(self._prompt or PromptDetails(), logprobs=result.prompt_logprobs)
        try:
            event = self._make_event(result)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # A panic of a Rust extension is a BaseException; it must not keep other streams of the step from waking.
            logger.exception("the answer to request %s could not be turned into text", self.request.id)
            self._error = InternalError("the answer could not be turned into text")
            self._ended = self.closed = True
            return
        self._events.append(event)
        self._ended = event.finish_reason is not None

    def _make_event(self, token: Token) -> TokenEvent:
        assert self._detokenizer is not None, "a stream is opened before its first token"
        self._tokens += 1
        params, text, reason = self.params, "", token.finish_reason
        ends_answer = reason is FinishReason.STOP and not token.complete
        stopped_by: str | int | None = None
        if ends_answer and token.token_id in params.stop_token_ids:
            stopped_by = self._stop_texts.get(token.token_id, token.token_id)
        # A token that ends the answer has no text, unless the request includes it.
        if not ends_answer or params.include_stop_str_in_output:
            text, stop = self._detokenizer.push(token.token_id, self._tokens >= params.min_tokens)
            if stop is not None:
                reason, stopped_by = FinishReason.STOP, stop
                self.closed = True
        if reason is not None:
            text += self._detokenizer.flush()
        deltas = None if self._parser is None else self._parse(self._parser, text, reason is not None)
        return TokenEvent(token.token_id, text, token.elapsed_s, reason, token.logprobs, stopped_by, deltas)

    def _parse(self, parser: AnswerParser, text: str, last: bool) -> tuple[Delta, ...]:
        deltas = parser.feed(text)
        return (*deltas, *parser.end()) if last else tuple(deltas)

    def _take_chunk(self) -> Chunk:
        events, self._events = tuple(self._events), []
        prompt, self._prompt = self._prompt, None
        embedding, self._embedding = self._embedding, None
        started = self.arrived if self.started is None else self.started
        return Chunk(events, self.prompt_tokens, started - self.arrived, self.cached_tokens, prompt, embedding)


def wake_all(streams: Iterable[TokenStream]) -> None:
    """Wake the consumers of a step with one call into each event loop, whatever the number of streams."""
    by_loop: dict[asyncio.AbstractEventLoop, list[TokenStream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, members in by_loop.items():
        try:
            loop.call_soon_threadsafe(_wake_each, members)
        except RuntimeError:
            # The loop is closed and its consumers are gone.
            for stream in members:
                stream.close()


def _wake_each(streams: list[TokenStream]) -> None:
    for stream in streams:
        try:
            stream.wake()
        except Exception:
            # The consumer of one stream must not keep other streams of the step from waking.
            logger.exception("the consumer of request %s failed", stream.request.id)
            stream.close()
