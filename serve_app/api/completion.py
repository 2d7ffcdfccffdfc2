"""The state of one answer: its text, its tokens and its times so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.api.responses import Metrics, Usage, milliseconds, rate, usage
from serve_app.core.events import (
    Chunk,
    Delta,
    FinishReason,
    PromptDetails,
    ReasoningDelta,
    TextDelta,
    TokenEvent,
    ToolCallDelta,
)


@dataclass(slots=True)
class CompletionState:
    """The sum of the chunks of one answer so far. Times are in seconds since the request's arrival.

    `logprob_events` are the events with log probabilities. `deltas` is None unless the answer is divided.
    """

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
    logprob_events: list[TokenEvent] = field(default_factory=list)
    deltas: list[Delta] | None = None
    _tokens_before_content: int = 0
    _content_began: bool = False

    def add(self, chunk: Chunk) -> None:
        """Take in a chunk with all of its events."""
        self.add_facts(chunk)
        for event in chunk.events:
            self.add_event(event)

    def add_facts(self, chunk: Chunk) -> None:
        """Take in a chunk without its events."""
        self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        self.queue_s = chunk.queue_s
        self.prompt = self.prompt or chunk.prompt
        self.embedding = chunk.embedding

    def add_event(self, event: TokenEvent) -> None:
        self.first_s = event.elapsed_s if self.first_s is None else self.first_s
        self.last_s = event.elapsed_s
        self.tokens += 1
        self.text += event.text
        self.finish_reason, self.stopped_by = event.finish_reason, event.stopped_by
        self.token_ids.append(event.token_id)
        if event.deltas is not None:
            self._add_deltas(event.deltas)
        if event.logprobs is not None:
            self.logprob_events.append(event)

    def _add_deltas(self, deltas: Sequence[Delta]) -> None:
        if self.deltas is None:
            self.deltas = []
        self.deltas += deltas
        self._content_began = self._content_began or any(not isinstance(delta, ReasoningDelta) for delta in deltas)
        self._tokens_before_content += not self._content_began

    @property
    def reasoning_tokens(self) -> int:
        """The number of tokens before the content of an answer that begins with reasoning."""
        deltas = self.deltas or ()
        return self._tokens_before_content if isinstance(next(iter(deltas), None), ReasoningDelta) else 0

    @property
    def content(self) -> str:
        """The text without reasoning and tool calls."""
        if self.deltas is None:
            return self.text
        return "".join(delta.text for delta in self.deltas if isinstance(delta, TextDelta))

    @property
    def reasoning(self) -> str:
        return "".join(delta.text for delta in self.deltas or () if isinstance(delta, ReasoningDelta))

    @property
    def calls(self) -> list[tuple[str, str]]:
        """The name and the arguments, the text of a JSON object, of each tool call."""
        calls: list[tuple[str, str]] = []
        for delta in self.deltas or ():
            if isinstance(delta, ToolCallDelta):
                if delta.name:
                    calls.append((delta.name, delta.arguments))
                else:
                    name, arguments = calls[delta.index]
                    calls[delta.index] = (name, arguments + delta.arguments)
        return calls

    @property
    def reason(self) -> FinishReason:
        """Why the answer ended."""
        assert self.finish_reason is not None, "an engine ends every answer with a finish reason"
        return self.finish_reason

    def usage(self) -> Usage:
        return usage(self.prompt_tokens, self.cached_tokens, self.tokens, self.reasoning_tokens)

    def metrics(self) -> Metrics:
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


def total_usage(states: Sequence[CompletionState]) -> Usage:
    """The usage of several answers, each to a prompt of its own."""
    return usage(
        sum(state.prompt_tokens for state in states),
        sum(state.cached_tokens for state in states),
        sum(state.tokens for state in states),
        sum(state.reasoning_tokens for state in states),
    )
