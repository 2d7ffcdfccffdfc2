"""How much a request has used, and the counters that the limits of its caller name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from serve_app.config import Price
from serve_app.core.events import Chunk, ReasoningDelta
from serve_app.core.requests import GenerationRequest
from serve_app.core.tenants import Limits
from serve_app.core.usage import NANODOLLARS, Usage
from serve_app.gateway.counters import DOLLARS, TOKENS, Counter, Kind, period_of


class Spending:
    """What one request has used so far. Replayed chunks cost nothing: they were computed for another request."""

    def __init__(self, price: Price) -> None:
        self._price = price
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.reasoning_tokens = 0
        self._began = self._answers = False

    def add(self, chunk: Chunk) -> None:
        began, self._began = self._began, True
        if chunk.replayed:
            return
        if not began:
            self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        self.output_tokens += len(chunk.events)
        if self._answers or not chunk.events:
            return
        for event in chunk.events:
            deltas = event.deltas
            self._answers = deltas is None or any(not isinstance(delta, ReasoningDelta) for delta in deltas)
            if self._answers:
                break
            self.reasoning_tokens += 1

    @property
    def nanodollars(self) -> int:
        return self._price.nanodollars(self.prompt_tokens, self.cached_tokens, self.output_tokens)

    def usage(self, request: GenerationRequest) -> Usage:
        return Usage(
            request.tenant,
            request.key,
            request.model,
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
            self.reasoning_tokens,
            self.nanodollars,
        )

    def amounts(self, counters: Sequence[Counter]) -> list[int]:
        """What was used of each counter. Nothing is used of the concurrent requests."""
        tokens, nanodollars = self.prompt_tokens + self.output_tokens, self.nanodollars
        return [amount_of(counter.kind, tokens, nanodollars, concurrent=0) for counter in counters]


def amount_of(kind: Kind, tokens: int, nanodollars: int, concurrent: int = 1) -> int:
    """The amount that a request takes of a counter."""
    if kind in TOKENS:
        return tokens
    if kind in DOLLARS:
        return nanodollars
    return concurrent if kind is Kind.CONCURRENT_REQUESTS else 1


def counters_of(
    subjects: Sequence[tuple[str, Limits]], counts_request: bool, is_concurrent: bool
) -> tuple[Counter, ...]:
    """The counters of a request by the limits of its key and its tenant.

    The requests a minute are among them if it counts as a request, and the concurrent requests if it counts as one.
    """
    now, periods = datetime.now(UTC), dict[Kind, str]()
    found: list[Counter] = []
    for subject, limits in subjects:
        for kind, name in _KINDS:
            limit = getattr(limits, name)
            if limit is None or (kind is Kind.REQUESTS_PER_MINUTE and not counts_request):
                continue
            if kind is Kind.CONCURRENT_REQUESTS and not is_concurrent:
                continue
            in_units = round(limit * NANODOLLARS) if kind in DOLLARS else limit
            if kind not in periods:
                periods[kind] = period_of(kind, now)
            found.append(Counter(subject, kind, in_units, periods[kind]))
    return tuple(found)


_KINDS = tuple((kind, kind.value) for kind in Kind)
