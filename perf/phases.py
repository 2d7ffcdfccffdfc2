"""Decides which requests of a load are measured: those that were due in the measurement window.

A load has three phases: the warm-up runs until latency is steady; the window holds the measured requests; the
cool-down keeps the load running until the last measured request is complete. Without a cool-down, the last measured
requests would meet a server with less load than the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from perf.records import Record

# Latency is steady when the medians of two successive parts of the warm-up differ by at most this share.
_STEADY_TOLERANCE = 0.15
# The load stops after this many failures in a row, plus one for each concurrent request.
_MAX_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True, slots=True)
class Window:
    """The window ends after `requests` requests or `duration_s` seconds, whichever comes first.

    `warmup` is a number of requests, or "auto": until latency is steady, at most `warmup_limit_s` seconds. Without
    `cooldown` the load ends with the last request of the window: for schedules that are replayed as a whole.
    """

    requests: int | None = None
    duration_s: float | None = None
    warmup: int | Literal["auto"] = "auto"
    warmup_limit_s: float = 20.0
    cooldown: bool = True


@dataclass
class Measurement:
    """One repeat of a load. `records` are those of the window; `all_records` include warm-up and cool-down."""

    opened: float = 0.0
    closed: float = 0.0
    cpu_s: float = 0.0  # processor time of this process during the window
    steady: bool | None = None  # None: there was no warm-up
    warmup_requests: int = 0
    records: list[Record] = field(default_factory=list)
    all_records: list[Record] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)  # time, and lateness of the event loop

    @property
    def window_s(self) -> float:
        return self.closed - self.opened


class PhaseController:
    """Moves a load through its phases. The load generator calls `start` and `finish` for every request.

    `concurrency` is the number of requests in flight: the warm-up compares parts of this size. `on_finish` is called
    after each finished request.
    """

    def __init__(
        self,
        window: Window,
        concurrency: int,
        clock: Callable[[], float] = time.monotonic,
        on_finish: Callable[[PhaseController, Record], None] | None = None,
    ) -> None:
        self.measurement = Measurement()
        self.window = window
        self.phase: Literal["warm-up", "window", "cool-down", "done"] = "warm-up"
        self._open_requests: dict[int, Record] = {}
        self._concurrency = max(2, concurrency)
        self._clock = clock
        self._on_finish = on_finish
        self._started: float | None = None
        self._warmup_records: list[Record] = []
        self._unfinished = self._failures = 0

    @property
    def in_flight(self) -> int:
        return len(self._open_requests)

    @property
    def unfinished_records(self) -> list[Record]:
        """Records of the window whose requests are in flight."""
        return [record for record in self._open_requests.values() if record.in_window]

    @property
    def finished(self) -> int:
        return len(self.measurement.records) - self._unfinished

    def start(self, due: float) -> Record | None:
        """The record of a request that is due at this time; None if the load is over."""
        if self._started is None:
            self._started = due
            if self.window.warmup == 0:
                self._open(due)
        if self.phase == "window" and self._is_full(due):
            self.stop()
        if self.phase == "done" or (self.phase == "cool-down" and not self.window.cooldown):
            return None
        record = Record(due, in_window=self.phase == "window")
        self.measurement.all_records.append(record)
        self._open_requests[id(record)] = record
        if record.in_window:
            self.measurement.records.append(record)
            self._unfinished += 1
        return record

    def finish(self, record: Record) -> None:
        del self._open_requests[id(record)]
        self._failures = 0 if record.ok else self._failures + 1
        if record.in_window:
            self._unfinished -= 1
            self._close_if_done()
        elif self.phase == "warm-up":
            self._warmup_records.append(record)
            if self._is_warm():
                self._open(self._clock())
        if self._failures >= _MAX_FAILURES_IN_A_ROW + self._concurrency:
            self.stop()
        if self._on_finish is not None:
            self._on_finish(self, record)

    def stop(self) -> None:
        """Adds no more requests to the window; those in flight still count."""
        if self.phase == "warm-up":  # no request was measured yet: report those of the warm-up
            self._open(self._clock() if self._started is None else self._started)
            self.measurement.records = list(self.measurement.all_records)
            self.measurement.steady, self.measurement.warmup_requests = False, 0
            for record in self.measurement.records:
                record.in_window = True
            self._unfinished = self.in_flight
        if self.phase == "window":
            self.phase = "cool-down"
            self._close_if_done()

    def _is_full(self, at: float) -> bool:
        requests, duration_s = self.window.requests, self.window.duration_s
        if requests is not None and len(self.measurement.records) >= requests:
            return True
        return duration_s is not None and at - self.measurement.opened >= duration_s

    def _is_warm(self) -> bool:
        self.measurement.steady = self._is_steady()
        if self.window.warmup != "auto":
            return len(self._warmup_records) >= self.window.warmup
        assert self._started is not None
        return self.measurement.steady or self._clock() - self._started > self.window.warmup_limit_s

    def _is_steady(self) -> bool:
        """Whether the last requests had the same median service time as the same number before them."""
        size = self._concurrency
        times = [record.service for record in self._warmup_records[-2 * size :] if record.service and record.ok]
        if len(times) < 2 * size:
            return False
        earlier, later = float(np.median(times[:size])), float(np.median(times[size:]))
        return abs(later - earlier) <= _STEADY_TOLERANCE * earlier

    def _open(self, at: float) -> None:
        self.phase = "window"
        self.measurement.warmup_requests = len(self.measurement.all_records)
        self.measurement.opened = at
        self.measurement.cpu_s = -time.process_time()

    def _close_if_done(self) -> None:
        if self.phase == "cool-down" and self._unfinished == 0:
            self.phase = "done"
            self.measurement.closed = self._clock()
            self.measurement.cpu_s += time.process_time()
