"""One live line on a terminal; elsewhere a line every few seconds. On standard error, so that results can be piped."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from types import TracebackType
from typing import Self, TextIO

import numpy as np

from perf.gate import Gate
from perf.results import Stage

_LIVE_S, _PLAIN_S = 0.25, 5.0


class Progress:
    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._live = out.isatty()
        self._name = ""
        self._gate: Gate | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._refresh())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        self._clear()

    def say(self, sentence: str) -> None:
        self._clear()
        print(sentence, file=self._out, flush=True)

    def running(self, name: str, gate: Gate) -> None:
        self._name, self._gate = name, gate

    def ended(self, stage: Stage) -> None:
        self._gate = None
        failed = f", {stage.failed} failed" if stage.errors else ""
        figures = f"{stage.finished} of {stage.requests} answers, {stage.tokens_per_s:.0f} tok/s"
        self.say(f"{stage.scenario}: {stage.name}: {figures}{failed}")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_LIVE_S if self._live else _PLAIN_S)
            if self._gate is not None:
                self._show(line_of(self._name, self._gate, time.monotonic()))

    def _show(self, line: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{line[:width]}", end="", file=self._out, flush=True)
        else:
            print(line, file=self._out, flush=True)

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="", file=self._out, flush=True)


def line_of(name: str, gate: Gate, now: float) -> str:
    """What is known so far of a load under way."""
    measured, window = gate.measured, gate.window
    if gate.phase == "warm-up":
        return f"{name}: warming up, {len(measured.everybody)} requests, {gate.in_flight} in flight"
    elapsed = max(now - measured.opened, 1e-3)
    done = [record for record in measured.records if record.ok]
    shares = (elapsed / (window.duration_s or float("inf")), gate.finished / (window.requests or float("inf")))
    share = max(shares)
    parts = [
        f"{name}: {min(share, 1):.0%}",
        f"{gate.in_flight} in flight",
        f"{sum(record.tokens for record in done) / elapsed:.0f} tok/s",
    ]
    if ttft := [record.ttft for record in done if record.ttft is not None]:
        median, late = np.percentile(ttft, [50, 95]) * 1e3
        parts.append(f"TTFT {median:.0f}, p95 {late:.0f} ms")
    if 0 < share < 1:
        parts.append(f"{elapsed / share - elapsed:.0f} s left")
    return ", ".join(parts)
