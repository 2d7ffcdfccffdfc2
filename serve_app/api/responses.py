"""Parts of answers that several dialects share, as typed dictionaries.

Encoders build the answers as these types, and the OpenAPI document describes them, so that mypy checks that the service
sends what it documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from serve_app.errors import ServeAppError

# A class decorator: the type has no other fields.
exact = with_config(ConfigDict(extra="forbid"))

# JSON has neither infinity nor NaN. OpenAI writes this value for a token that cannot occur.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """How a dialect answers with an error: the body for the error of a request with this id, and the status."""

    body: Callable[[ServeAppError, str], object]
    status: Callable[[ServeAppError], int] = lambda error: error.status


def finite(logprob: float) -> float:
    """A log probability as JSON can hold it."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


@exact
class CachedTokens(TypedDict):
    cached_tokens: int


@exact
class ReasoningTokens(TypedDict):
    reasoning_tokens: int


@exact
class Usage(TypedDict):
    """Counts of tokens. `cached_tokens` of the prompt were in the prefix cache.

    `completion_tokens_details` is there if answers have reasoning, whose tokens are among the `completion_tokens`.
    """

    prompt_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens: int
    completion_tokens_details: NotRequired[ReasoningTokens]
    total_tokens: int


@exact
class Metrics(TypedDict):
    """Times in milliseconds since the request's arrival; null for an instant that did not happen.

    `tpot_ms` is the mean time of a token after the first one. `tokens_per_second` covers the whole elapsed time.
    """

    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float
    tokens_generated: int
    tokens_per_second: float
    elapsed_ms: float


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int, reasoning_tokens: int = 0) -> Usage:
    counts: Usage = {
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counts


def retry_headers(seconds: float) -> dict[str, str]:
    """The standard's header in whole seconds, and the one in milliseconds that OpenAI's clients prefer."""
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def rate(tokens: int, seconds: float) -> float:
    """Tokens per second; 0 if no time has passed."""
    return round(tokens / seconds, 2) if seconds > 0 else 0.0
