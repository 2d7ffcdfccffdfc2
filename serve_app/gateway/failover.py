"""Continues the answer of a replica that was lost on another replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from random import getrandbits

from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import NotReady, QueueFull
from serve_app.gateway.stage import Stage

log = logging.getLogger(__name__)

# The pause before each further attempt. A request that ends the replicas that compute it is not sent to more of them.
PAUSES_S = (0.0, 0.2, 1.0)
# The pause before a request is sent again that the remaining replicas refused, because they are full.
_FULL_PAUSE_S = 0.5


class Failover(Stage):
    """Sends a request again, with the tokens of its answer so far, when the replica that served it was lost.

    The engine wrapped by this stage raises NotReady for a lost replica. The answer goes on as if nothing had happened:
    the engine computes prompt and tokens again and samples with the same seed. With `draws_seeds` a request that has no
    seed gets one here. A request is sent to at most 1 + len(PAUSES_S) replicas, and not after its deadline. `resumed`
    is called for each further attempt.
    """

    def __init__(self, inner: Engine, resumed: Callable[[], None], draws_seeds: bool = True) -> None:
        super().__init__(inner)
        self._resumed = resumed
        self._draws_seeds = draws_seeds

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        attempt = _Attempt(_with_seed(request) if self._draws_seeds else request)
        pauses = iter(PAUSES_S)
        while True:
            try:
                async with aclosing(self.inner.generate(attempt.request)) as chunks:
                    async for chunk in chunks:
                        yield attempt.add(chunk)
                return
            except NotReady as error:
                pause_s = next(pauses, None)
                if pause_s is None or not attempt.can_continue(pause_s):
                    raise
                self._resumed()
                log.warning("request %s goes on after %d tokens: %s", request.id, attempt.sent, error)
            except QueueFull:
                pause_s = _FULL_PAUSE_S
                if not attempt.interrupted or not attempt.can_continue(pause_s):
                    raise
            attempt = attempt.next()
            await asyncio.sleep(pause_s)


class _Attempt:
    """The answer of one replica to a request, and what was sent before it."""

    def __init__(self, request: GenerationRequest, first: Chunk | None = None, interrupted: bool = False) -> None:
        self.request = request
        self.interrupted = interrupted
        self._first = first
        self._tokens = list(request.resumed)
        self._finished = False

    @property
    def sent(self) -> int:
        """The number of tokens of the answer that were sent."""
        return len(self._tokens)

    def add(self, chunk: Chunk) -> Chunk:
        """Note what is sent. Later attempts report the facts of the first: its time in the queue, its cached tokens."""
        self._tokens += [event.token_id for event in chunk.events]
        self._finished = chunk.finished
        if self._first is None:
            self._first = chunk
            return chunk
        if not self.request.resumed:
            return chunk
        first = self._first
        return replace(chunk, queue_s=first.queue_s, cached_tokens=first.cached_tokens, prompt=None, began_ns=0)

    def can_continue(self, pause_s: float) -> bool:
        return not self._finished and time.monotonic() + pause_s < self.request.deadline

    def next(self) -> _Attempt:
        """The next attempt. What the first chunk carries about the prompt is not computed again."""
        request = self.request
        if self._tokens:
            params = replace(request.params, prompt_logprobs=None)
            request = replace(request, params=params, prompt_details=False, resumed=tuple(self._tokens))
        return _Attempt(request, self._first, interrupted=True)


def _with_seed(request: GenerationRequest) -> GenerationRequest:
    if request.params.seed is not None or not request.params.temperature:
        return request
    return replace(request, params=replace(request.params, seed=getrandbits(63)))
