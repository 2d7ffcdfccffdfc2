"""The errors of requests that a limit refuses, and the rate limits for the headers of a response."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from serve_app.core.quotas import CallQuota, RateLimit
from serve_app.core.usage import NANODOLLARS
from serve_app.errors import InsufficientQuota, RateLimitExceeded, ServeAppError
from serve_app.gateway.counters import BUDGETS, DOLLARS, Counter, Kind, fits, remaining, reset_s, wait_s

_WORDS = {
    Kind.REQUESTS_PER_MINUTE: "requests per minute",
    Kind.TOKENS_PER_MINUTE: "tokens per minute",
    Kind.CONCURRENT_REQUESTS: "concurrent requests",
    Kind.TOKENS_PER_DAY: "tokens per day",
    Kind.TOKENS_PER_MONTH: "tokens per month",
    Kind.DOLLARS_PER_DAY: "dollars per day",
    Kind.DOLLARS_PER_MONTH: "dollars per month",
}


def exceeded(
    counters: Sequence[Counter], values: Sequence[int], amounts: Sequence[int]
) -> tuple[Counter, ServeAppError]:
    """The counter that refuses a request, and the error. Of several, the one that the caller waits for longest."""
    now = datetime.now(UTC)
    refusing = [
        (counter, value, amount, wait_s(counter, value, amount, now))
        for counter, value, amount in zip(counters, values, amounts, strict=True)
        if not fits(counter, value, amount)
    ]
    counter, value, amount, wait = max(refusing, key=lambda one: float("inf") if one[3] is None else one[3])
    kind = InsufficientQuota if counter.kind in BUDGETS else RateLimitExceeded
    return counter, kind(_message(counter, value, amount), retry_after_s=wait)


def note_rates(call: CallQuota, counters: Sequence[Counter], values: Sequence[int]) -> None:
    """Tell the HTTP call what remains of the limits a minute."""
    for counter, value in zip(counters, values, strict=True):
        if counter.kind is Kind.REQUESTS_PER_MINUTE:
            call.note_requests(_rate(counter, value))
        elif counter.kind is Kind.TOKENS_PER_MINUTE:
            call.note_tokens(_rate(counter, value))


def _rate(counter: Counter, value: int) -> RateLimit:
    return RateLimit(counter.limit, remaining(counter, value), reset_s(counter, value))


def _message(counter: Counter, value: int, amount: int) -> str:
    whose, words = counter.subject.partition(":")[0], _WORDS[counter.kind]
    limit, left, wanted = (_quantity(counter, number) for number in (counter.limit, remaining(counter, value), amount))
    state = f"The limit of the {whose} is {limit} {words}. {left} are left, and the request can use up to {wanted}."
    if counter.kind is Kind.CONCURRENT_REQUESTS:
        return f"The {whose} has {limit} concurrent requests, which is its limit. Wait until one has ended."
    if counter.kind is Kind.REQUESTS_PER_MINUTE:
        return f"The {whose} has reached its limit of {limit} requests per minute. Try again later."
    if amount > counter.limit:
        return f"{state} Send a shorter prompt, or set a lower limit for the answer."
    return f"{state} Set a lower limit for the answer, or try again later."


def _quantity(counter: Counter, number: int) -> str:
    return f"{number / NANODOLLARS:.6f}".rstrip("0").rstrip(".") if counter.kind in DOLLARS else str(number)
