"""What happened to one request: instants of the monotonic clock, in seconds; None did not happen."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """`due` is when it was to be sent. A client that is late makes it no faster: latency counts from there."""

    due: float
    counts: bool = False  # whether it was due in the window that is measured
    prompts: int = 1
    sent: float | None = None
    chunks: array[float] = field(default_factory=lambda: array("d"))  # arrivals of reads that brought tokens
    events: array[int] = field(default_factory=lambda: array("I"))  # how many events with tokens each brought
    done: float | None = None  # whether well or not
    prompt_tokens: int = 0
    tokens: int = 0  # as the server counted them
    error: str | None = None  # its kind, such as `http 429` or `timeout`
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
        """Seconds a token, the first one excluded; chunks of several tokens do not distort it."""
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
        """Between chunks. A chunk of k tokens is one gap: k - 1 gaps of zero would flatter."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    def tokens_within(self, start: float, end: float) -> float:
        """How many of its tokens arrived in [start, end); a whole answer arrives at its end."""
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
