"""Progress on standard error: one live line on a terminal, otherwise a line every 5 s."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from types import TracebackType
from typing import Self, TextIO

import numpy as np

from perf.phases import PhaseController
from perf.results import Stage

_TERMINAL_INTERVAL_S, _LOG_INTERVAL_S = 0.25, 5.0


class LiveLine:
    """A line that `show` replaces on a terminal, every `interval_s` seconds; elsewhere each call adds a line."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._is_terminal = self._out.isatty()
        self.interval_s = _TERMINAL_INTERVAL_S if self._is_terminal else _LOG_INTERVAL_S

    def show(self, line: str) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{line[:width]}", end="", file=self._out, flush=True)
        else:
            print(line, file=self._out, flush=True)

    def print(self, line: str) -> None:
        """Prints a line that stays."""
        self.clear()
        print(line, file=self._out, flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[2K", end="", file=self._out, flush=True)


class Progress:
    def __init__(self, out: TextIO | None = None) -> None:
        self._line = LiveLine(out)
        self._name = ""
        self._controller: PhaseController | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._refresh())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        self._line.clear()

    def print(self, line: str) -> None:
        self._line.print(line)

    def running(self, name: str, controller: PhaseController) -> None:
        self._name, self._controller = name, controller

    def ended(self, stage: Stage) -> None:
        self._controller = None
        failed = f", {stage.failed} failed" if stage.errors else ""
        finished = f"{stage.finished} of {stage.requests} requests finished, {stage.tokens_per_s:.0f} tok/s"
        self.print(f"{stage.scenario}: {stage.name}: {finished}{failed}")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._line.interval_s)
            if self._controller is not None:
                self._line.show(status_line(self._name, self._controller, time.monotonic()))


def status_line(name: str, controller: PhaseController, now: float) -> str:
    """Progress, throughput and TTFT of a load that is running."""
    measurement, window = controller.measurement, controller.window
    if controller.phase == "warm-up":
        return f"{name}: warm-up, {len(measurement.all_records)} requests, {controller.in_flight} in flight"
    elapsed = max(now - measurement.opened, 1e-3)
    done = [record for record in measurement.records if record.ok]
    shares = (elapsed / (window.duration_s or float("inf")), controller.finished / (window.requests or float("inf")))
    share = max(shares)
    parts = [
        f"{name}: {min(share, 1):.0%}",
        f"{controller.in_flight} in flight",
        f"{sum(record.tokens for record in done) / elapsed:.0f} tok/s",
    ]
    if ttft := [record.ttft for record in done if record.ttft is not None]:
        p50, p95 = np.percentile(ttft, [50, 95]) * 1e3
        parts.append(f"TTFT p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    if 0 < share < 1:
        parts.append(f"{elapsed / share - elapsed:.0f} s left")
    return ", ".join(parts)
