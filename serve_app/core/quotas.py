"""What the limits say to one HTTP call, reported from the gateway to the HTTP layer."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field


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


def _less(one: RateLimit | None, other: RateLimit) -> RateLimit:
    """The rate limit that leaves less."""
    return other if one is None or other.remaining <= one.remaining else one
