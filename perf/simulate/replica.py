"""A simulated replica: continuous batching with chunked prefill, exact between two events and without time steps."""

from __future__ import annotations

import heapq
import math
from array import array
from collections import deque
from dataclasses import dataclass

from perf.simulate.cache import BlockCache
from perf.simulate.settings import Profile

# Tokens: what remains of a prompt or an answer below this is rounding.
_ROUNDING = 1e-6


@dataclass(slots=True, eq=False)
class Request:
    """One request and what became of it. Times in seconds, None if they have not come.

    `digests` are those of the prompt, `after` those of prompt and answer. `resumed` tokens of the answer were generated
    by replicas that were lost.
    """

    number: int
    arrived: float
    prompt: int
    answer: int
    digests: array[int]
    after: array[int]
    session: str = ""
    began: float | None = None
    first: float | None = None
    ended: float | None = None
    error: str = ""
    attempts: int = 0
    resumed: int = 0
    cached: int = -1  # tokens found at the first attempt
    replica: str = ""
    remaining: float = 0.0  # tokens of the prompt, while it is computed
    finish: float = 0.0  # the replica's `decoded` at the last token

    @property
    def to_compute(self) -> int:
        return self.prompt + self.resumed


class Replica:
    """Computes requests. After each call of `submit` or `step`, `next_at` is the time of its next event.

    A step computes one token of each decoding sequence, and a chunk of the first prompt that waits. It takes the time
    of both: max(1 / alone_rate, sequences / answer_rate) + chunk / prompt_rate. Between two events all speeds are
    constant, therefore all sequences are known by one number, `decoded`: the tokens that a sequence would have that
    decodes since the beginning (processor sharing by virtual time).
    """

    def __init__(self, name: str, profile: Profile, now: float, cache: BlockCache | None = None) -> None:
        self.name = name
        self.began = now
        self.cache = BlockCache(profile.kv_tokens // profile.block_tokens) if cache is None else cache
        self.version = 0  # of the next event
        self.waiting: deque[Request] = deque()  # for a slot
        self.prefill: deque[Request] = deque()  # with a slot; the first one is computed
        self.decoding: list[tuple[float, int, Request]] = []
        self.decoded = 0.0
        self.held = 0  # tokens of the KV cache
        self.computed_tokens = 0.0
        self.cached_tokens = 0.0
        self.generated_tokens = 0.0
        self.waiting_tokens = 0
        self.lost = False  # it computes no more, which the routers may not know yet
        self._profile = profile
        self._now = now

    @property
    def ongoing(self) -> int:
        return len(self.waiting) + len(self.prefill) + len(self.decoding)

    @property
    def running(self) -> int:
        return len(self.prefill) + len(self.decoding)

    def requests(self) -> list[Request]:
        return [*self.waiting, *self.prefill, *(entry[-1] for entry in self.decoding)]

    def submit(self, request: Request, now: float) -> None:
        self.advance(now)
        self.waiting.append(request)
        self.waiting_tokens += request.to_compute
        if not self.lost:
            self._fill(now)

    def next_at(self) -> float:
        if self.lost:
            return math.inf
        step_s, chunk = self._step()
        at = math.inf
        if self.prefill:
            at = self.prefill[0].remaining * step_s / chunk
        if self.decoding:
            at = min(at, (self.decoding[0][0] - self.decoded) * step_s)
        return self._now + max(0.0, at)

    def step(self, now: float) -> tuple[list[Request], list[Request]]:
        """The requests that have their first token now, and those that end now."""
        self.advance(now)
        first, ended = [], []
        while self.prefill and self.prefill[0].remaining <= _ROUNDING:
            request = self._prefilled(now)
            if request.first is None:
                request.first = now
                first.append(request)
            if request.finish <= self.decoded + _ROUNDING:
                ended.append(request)
            else:
                heapq.heappush(self.decoding, (request.finish, request.number, request))
        while self.decoding and self.decoding[0][0] <= self.decoded + _ROUNDING:
            ended.append(heapq.heappop(self.decoding)[-1])
        for request in ended:
            request.ended = now
            self.held -= request.prompt + request.answer
            self.cache.add(request.after)
        self._fill(now)
        return first, ended

    def lose(self, now: float) -> None:
        """Compute no more from now on."""
        self.advance(now)
        self.lost = True

    def abandon(self) -> list[Request]:
        """End all requests as they are. Returns them, with the tokens of their answers so far in `resumed`."""
        lost = self.requests()
        for finish, _, request in self.decoding:
            request.resumed = min(request.answer - 1, math.floor(request.answer - (finish - self.decoded)))
        self.waiting.clear()
        self.prefill.clear()
        self.decoding.clear()
        return lost

    def generated(self, finish: float, answer: int) -> float:
        """The tokens of the answer of a decoding sequence."""
        return answer - (finish - self.decoded)

    def advance(self, now: float) -> None:
        """Compute until `now`. Nothing begins or ends before."""
        passed, self._now = now - self._now, now
        if self.lost or passed <= 0 or not (self.prefill or self.decoding):
            return
        step_s, chunk = self._step()
        tokens = passed / step_s
        if self.decoding:
            self.decoded += tokens
            self.generated_tokens += tokens * len(self.decoding)
        if self.prefill:
            self.prefill[0].remaining -= tokens * chunk

    def _step(self) -> tuple[float, float]:
        """Seconds of a step, and the tokens of a prompt in it."""
        profile, decoding = self._profile, len(self.decoding)
        chunk = max(1, profile.step_tokens - decoding) if self.prefill else 0
        decode_s = max(1 / profile.alone_rate, decoding / profile.answer_rate) if decoding else 0.0
        return decode_s + chunk / profile.prompt_rate, chunk

    def _fill(self, now: float) -> None:
        """Give free slots to waiting requests, if the KV cache has room for them."""
        idle, profile = not self.prefill, self._profile
        while self.waiting and self.running < profile.slots:
            request = self.waiting[0]
            if self.held + request.prompt + request.answer > profile.kv_tokens and self.running:
                break
            self.held += request.prompt + request.answer
            self.prefill.append(self.waiting.popleft())
        if idle and self.prefill:
            self._begin(self.prefill[0], now)

    def _begin(self, request: Request, now: float) -> None:
        """The prompt is looked up in the cache when it is its turn; its last token is always computed."""
        request.began = now if request.began is None else request.began
        self.waiting_tokens -= request.to_compute
        known = request.after if request.resumed else request.digests
        most = min(request.to_compute - 1, len(known) * self._profile.block_tokens)
        cached = min(most, self.cache.matched(known) * self._profile.block_tokens)
        request.cached = cached if request.cached < 0 else request.cached
        request.remaining = request.to_compute - cached
        self.cached_tokens += cached
        self.computed_tokens += request.remaining

    def _prefilled(self, now: float) -> Request:
        request = self.prefill.popleft()
        self.cache.add(request.digests)
        request.finish = self.decoded + request.answer - request.resumed - 1
        self.generated_tokens += 1
        if self.prefill:
            self._begin(self.prefill[0], now)
        return request
