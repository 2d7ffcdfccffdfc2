"""A simulated server in virtual time: load tests of seconds run in milliseconds and give the same result each time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any, TypeVar

from perf.client import Client
from perf.dialects import DIALECTS, Api
from perf.records import Record
from perf.workload import Request, Workload

_Result = TypeVar("_Result")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for the next timer, advances its clock to it."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_VirtualTimeSelector(self))

    def time(self) -> float:
        return self.now


class _VirtualTimeSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "no task has a timer: the simulation is deadlocked"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class SimulatedClient(Client):
    """Answers without a network. `stall`: start and end of a time in which the server sends nothing."""

    def __init__(
        self, ttft_s: float, itl_s: float, slots: int | None = None, stall: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        super().__init__("http://simulated", DIALECTS["native"](None, True), timeout_s=60)
        self._ttft_s, self._itl_s, self._stall = ttft_s, itl_s, stall
        self._slots = asyncio.Semaphore(slots) if slots is not None else None

    async def get(self, path: str) -> tuple[int, str]:
        return 404, ""

    async def send(self, record: Record, request: Request) -> None:
        clock = asyncio.get_running_loop().time
        record.sent = clock()
        async with self._slots or nullcontext():
            start = clock()
            for token in range(request.max_tokens):
                due = start + self._ttft_s + token * self._itl_s
                due = self._stall[1] if self._stall[0] <= due < self._stall[1] else due
                await asyncio.sleep(due - clock())
                record.arrived(clock(), 1)
        record.tokens, record.done = request.max_tokens, clock()


def client(url: str, api: Api = "native", timeout_s: float = 30) -> Client:
    return Client(url, DIALECTS[api](None, fixed_length=True), timeout_s)


def workload(max_tokens: int = 16, words: int = 10) -> Workload:
    return Workload(words, max_tokens, seed=7)
