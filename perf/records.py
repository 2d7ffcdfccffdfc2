"""The timestamps and results of one request; times are seconds of the monotonic clock, None if not reached."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """Latency counts from `due`, the scheduled time: a client that sends late does not make the server look faster."""

    due: float
    in_window: bool = False  # due in the measurement window
    prompts: int = 1
    sent: float | None = None
    chunks: array[float] = field(default_factory=lambda: array("d"))  # arrival times of reads with tokens
    events: array[int] = field(default_factory=lambda: array("I"))  # events with tokens in each of these reads
    done: float | None = None  # end of the request, successful or not
    prompt_tokens: int = 0
    tokens: int = 0  # as counted by the server
    error: str | None = None  # kind of failure, such as `http 429` or `timeout`
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None and self.done is not None

    @property
    def ttft(self) -> float | None:
        return self.chunks[0] - self.due if self.chunks else None

    @property
    def ttft_service(self) -> float | None:
        return self.chunks[0] - self.sent if self.chunks and self.sent is not None else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; independent of how many tokens a chunk holds."""
        if self.tokens < 2 or len(self.chunks) < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1)

    @property
    def e2e(self) -> float | None:
        return self.done - self.due if self.done is not None else None

    @property
    def service(self) -> float | None:
        return self.done - self.sent if self.done is not None and self.sent is not None else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks. A chunk of k tokens is one gap; k - 1 gaps of 0 s would lower the percentiles."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    def tokens_within(self, start: float, end: float) -> float:
        """Tokens that arrived in [start, end); a response without streaming arrives at its end."""
        if not self.chunks:
            return self.tokens if self.done is not None and start <= self.done < end else 0
        within = sum(events for at, events in zip(self.chunks, self.events, strict=True) if start <= at < end)
        return within * self.tokens_per_event

    @property
    def tokens_per_event(self) -> float:
        return self.tokens / sum(self.events)

    def arrived(self, at: float, events: int) -> None:
        self.chunks.append(at)
        self.events.append(events)
