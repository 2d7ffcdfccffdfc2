"""Which requests of a load count: those that were due in the window.

Before the window the same load runs until the latency has settled. After the last request of the window was due the
load goes on until that one has its answer, so that nobody who counts is served by an emptier server than the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from perf.records import Record

# The medians of two successive parts of the warm-up may differ by so much.
_SETTLED = 0.15
# So many failures in a row are an answer, too.
_FAILURES = 20


@dataclass(frozen=True, slots=True)
class Window:
    """How many requests count, or those of how many seconds, whichever is less; and what is let pass before.

    `warmup` is a number of requests, or "auto": until the latency has settled, `warmup_limit_s` at most. Without
    `hold` the load ends with the window's last request, as that of a schedule which means something as a whole.
    """

    requests: int | None = None
    duration_s: float | None = None
    warmup: int | Literal["auto"] = "auto"
    warmup_limit_s: float = 20.0
    hold: bool = True


@dataclass
class Measured:
    """One repeat of a load. `records` are the window's, `everybody` also those before and after it."""

    opened: float = 0.0
    closed: float = 0.0
    cpu_s: float = 0.0  # of this process, while the window was open
    steady: bool | None = None  # None: there was no warm-up to tell
    warmup_requests: int = 0
    records: list[Record] = field(default_factory=list)
    everybody: list[Record] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)  # when, and by how much the event loop was late

    @property
    def window_s(self) -> float:
        return self.closed - self.opened


class Gate:
    """Asked for every request that is due, told of every one that ended. `watch` is called with each of the latter."""

    def __init__(
        self,
        window: Window,
        together: int,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[Gate, Record], None] | None = None,
    ) -> None:
        """`together` requests are a part of the warm-up: as many as are under way at a time."""
        self.measured = Measured()
        self.window = window
        self.phase: Literal["warm-up", "window", "hold", "over"] = "warm-up"
        self._open_requests: dict[int, Record] = {}
        self._together = max(2, together)
        self._clock = clock
        self._watch = watch
        self._began: float | None = None
        self._warm: list[Record] = []
        self._unfinished = self._failures = 0

    @property
    def in_flight(self) -> int:
        return len(self._open_requests)

    @property
    def under_way(self) -> list[Record]:
        """Those of the window."""
        return [record for record in self._open_requests.values() if record.counts]

    @property
    def finished(self) -> int:
        return len(self.measured.records) - self._unfinished

    def due(self, at: float) -> Record | None:
        """The record of a request that is due at this instant; None: no more are wanted."""
        if self._began is None:
            self._began = at
            if self.window.warmup == 0:
                self._open(at)
        if self.phase == "window" and self._is_full(at):
            self.stop()
        if self.phase == "over" or (self.phase == "hold" and not self.window.hold):
            return None
        record = Record(at, counts=self.phase == "window")
        self.measured.everybody.append(record)
        self._open_requests[id(record)] = record
        if record.counts:
            self.measured.records.append(record)
            self._unfinished += 1
        return record

    def ended(self, record: Record) -> None:
        del self._open_requests[id(record)]
        self._failures = 0 if record.ok else self._failures + 1
        if record.counts:
            self._unfinished -= 1
            self._close_if_done()
        elif self.phase == "warm-up":
            self._warm.append(record)
            if self._is_warm():
                self._open(self._clock())
        if self._failures >= _FAILURES + self._together:
            self.stop()
        if self._watch is not None:
            self._watch(self, record)

    def stop(self) -> None:
        """What has been sent is enough; those under way still count."""
        if self.phase == "warm-up":  # nobody counted; what happened to them is all there is to tell
            self._open(self._clock() if self._began is None else self._began)
            self.measured.records = list(self.measured.everybody)
            self.measured.steady, self.measured.warmup_requests = False, 0
            for record in self.measured.records:
                record.counts = True
            self._unfinished = self.in_flight
        if self.phase == "window":
            self.phase = "hold"
            self._close_if_done()

    def _is_full(self, at: float) -> bool:
        requests, duration_s = self.window.requests, self.window.duration_s
        if requests is not None and len(self.measured.records) >= requests:
            return True
        return duration_s is not None and at - self.measured.opened >= duration_s

    def _is_warm(self) -> bool:
        self.measured.steady = self._has_settled()
        if self.window.warmup != "auto":
            return len(self._warm) >= self.window.warmup
        assert self._began is not None
        return self.measured.steady or self._clock() - self._began > self.window.warmup_limit_s

    def _has_settled(self) -> bool:
        """Whether the last requests took as long as those before them, in the middle."""
        if len(self._warm) < 2 * self._together:
            return False
        took = [record.service for record in self._warm[-2 * self._together :] if record.service and record.ok]
        if len(took) < 2 * self._together:
            return False
        earlier, later = float(np.median(took[: self._together])), float(np.median(took[self._together :]))
        return abs(later - earlier) <= _SETTLED * earlier

    def _open(self, at: float) -> None:
        self.phase = "window"
        self.measured.warmup_requests = len(self.measured.everybody)
        self.measured.opened = at
        self.measured.cpu_s = -time.process_time()

    def _close_if_done(self) -> None:
        if self.phase == "hold" and self._unfinished == 0:
            self.phase = "over"
            self.measured.closed = self._clock()
            self.measured.cpu_s += time.process_time()
