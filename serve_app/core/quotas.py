"""What the limits say to one HTTP call, passed from the gateway to the HTTP layer, and the usage of a request."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A limit a minute: what remains of it, and the seconds until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class CallQuota:
    """The requests of one HTTP call, which counts as one request, and the rate limits of its caller.

    `requests` and `tokens` are those of the key or of the tenant, whichever leaves less; None without a limit. `open`
    is the number of requests of the call that run. The call is `counted` when its first request was let through, and
    `concurrent` while a place among the concurrent requests is reserved for it. `at_end` is called when no request of
    the call runs any more.
    """

    requests: RateLimit | None = None
    tokens: RateLimit | None = None
    counted: bool = False
    concurrent: bool = False
    open: int = 0
    at_end: list[Callable[[], None]] = field(default_factory=list)

    def note_requests(self, rate: RateLimit) -> None:
        self.requests = _less(self.requests, rate)

    def note_tokens(self, rate: RateLimit) -> None:
        self.tokens = _less(self.tokens, rate)


# The current HTTP call; None outside of a call.
current_call: ContextVar[CallQuota | None] = ContextVar("current_call", default=None)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished request has used. `nanodollars` is its cost by the prices of the model.

    `cached_tokens` are among the `prompt_tokens`, and `reasoning_tokens` among the `output_tokens`.
    """

    tenant: str
    key: str
    model: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    nanodollars: int = 0


class UsageLog(Protocol):
    """Keeps the usage of requests. Returns at once, without I/O."""

    def record(self, usage: Usage) -> None:
        """Keep the usage of a request that has ended."""
        ...


def _less(one: RateLimit | None, other: RateLimit) -> RateLimit:
    """The rate limit that leaves less."""
    return other if one is None or other.remaining <= one.remaining else one
