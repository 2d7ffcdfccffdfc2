"""What is known of one answer so far: its text, its tokens and its times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.core.events import Chunk, FinishReason, PromptDetails, TokenEvent

Metrics = dict[str, float | int | None]
Usage = dict[str, int | dict[str, int]]


@dataclass(slots=True)
class CompletionState:
    """Times in seconds since the request's arrival; None for an instant that did not happen."""

    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    prompt: PromptDetails | None = None
    embedding: tuple[float, ...] | None = None
    events: list[TokenEvent] = field(default_factory=list)

    def arrived(self, chunk: Chunk) -> None:
        self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        self.queue_s = chunk.queue_s
        self.prompt = self.prompt or chunk.prompt
        self.embedding = chunk.embedding

    def count(self, event: TokenEvent) -> None:
        self.first_s = event.elapsed_s if self.first_s is None else self.first_s
        self.last_s = event.elapsed_s
        self.tokens += 1
        self.text += event.text
        self.finish_reason, self.stopped_by = event.finish_reason, event.stopped_by
        self.token_ids.append(event.token_id)
        if event.logprobs is not None:
            self.events.append(event)

    def usage(self) -> Usage:
        return usage(self.prompt_tokens, self.cached_tokens, self.tokens)

    def metrics(self) -> Metrics:
        """`tpot_ms` leaves the first token out; `tokens_per_second` covers the whole elapsed time."""
        return {
            "ttft_ms": None if self.first_s is None else milliseconds(self.first_s),
            "tpot_ms": self._tpot_ms(),
            "queue_ms": milliseconds(self.queue_s),
            "tokens_generated": self.tokens,
            "tokens_per_second": rate(self.tokens, self.last_s),
            "elapsed_ms": milliseconds(self.last_s),
        }

    def _tpot_ms(self) -> float | None:
        if self.first_s is None or self.tokens < 2:
            return None
        return milliseconds((self.last_s - self.first_s) / (self.tokens - 1))


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def together(tallies: Sequence[CompletionState], firsts: Sequence[int]) -> Usage:
    """Of all answers of a call. A prompt counts once, with the first of its answers, which are numbered `firsts`."""
    return usage(
        sum(tallies[first].prompt_tokens for first in firsts),
        sum(tallies[first].cached_tokens for first in firsts),
        sum(tally.tokens for tally in tallies),
    )


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def rate(tokens: int, seconds: float) -> float:
    """Tokens a second; 0 when no time has passed."""
    return round(tokens / seconds, 2) if seconds > 0 else 0.0
