"""Samples of the processes of a service: memory, descriptors, threads over time; and what must be left at the end."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.service import Program, metric_totals, wait_until

MB = 1e6


@dataclass
class Process:
    """The samples of one process: seconds since the start of the census, and values at these instants."""

    name: str
    times: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


@dataclass
class Tasks:
    """The tasks of one event loop over time."""

    name: str
    times: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)


def _number(found: Sequence[Process | Tasks]) -> None:
    for name, count in Counter(one.name for one in found).items():
        same = [one for one in found if one.name == name]
        for number, one in enumerate(same if count > 1 else [], 1):
            one.name = f"{name} {number}"


def name_of(command: Sequence[str]) -> str | None:
    """`Ingress` or `model-toy` for a replica, else the name of its program; None for a process without a command."""
    if not command:
        return None
    if found := re.search(r"ServeReplica:\w+:([\w-]+)|ray::SERVE_REPLICA::\w+#([\w-]+)#", command[0]):
        return found[1] or found[2]
    if command[0].startswith("ray::"):
        return command[0].split(".")[0]
    if "-m" in command:
        return command[command.index("-m") + 1]
    scripts = [word for word in command if word.endswith(".py")]
    return (scripts or command)[0].rsplit("/", 1)[-1]


class Census:
    """Samples all processes of `program` while its context is entered, and the event-loop delays in its metrics."""

    def __init__(self, program: Program, client: httpx.AsyncClient, every_s: float = 2.0) -> None:
        self.processes: dict[psutil.Process, Process] = {}
        self.lags_s: list[float] = []
        self.tasks: dict[str, Tasks] = {}
        self.left: list[str] = []
        self._program = program
        self._client = client
        self._every_s = every_s

    async def __aenter__(self) -> Self:
        self.began = time.monotonic()
        self._task = asyncio.create_task(self._sample_until_cancelled())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Number the processes that have the same name."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        _number(list(self.processes.values()))
        _number(list(self.tasks.values()))

    async def settle(self, before: dict[str, int]) -> None:
        """Wait until the service is idle and has the actors of `before`. `left` says what is not so in the end."""
        for waiting in (wait_until_all_idle(self._client), actors_again(self._program, before)):
            try:
                await waiting
            except AssertionError as error:
                self.left.append(str(error))

    async def _sample_until_cancelled(self) -> None:
        while True:
            await asyncio.to_thread(self.sample)
            with suppress(httpx.TransportError, httpx.HTTPStatusError):
                await self._sample_loops()
            await asyncio.sleep(self._every_s)

    async def _sample_loops(self) -> None:
        """The newest delay of each event loop, and its tasks."""
        text = (await self._client.get("/metrics")).raise_for_status().text
        at = time.monotonic() - self.began
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if one.name == "serve_app_event_loop_lag_seconds":
                    self.lags_s.append(one.value)
                elif one.name == "serve_app_event_loop_tasks":
                    name = f"model-{one.labels['model']}" if one.labels["model"] else "Ingress"
                    found = self.tasks.setdefault(one.labels["replica"], Tasks(name))
                    found.times.append(at)
                    found.counts.append(one.value)

    def sample(self) -> None:
        program = psutil.Process(self._program.process.pid)
        for process in (program, *self._program.descendants()):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                self._sample_one(process)

    def _sample_one(self, process: psutil.Process) -> None:
        if process.status() == psutil.STATUS_ZOMBIE:
            return
        if process not in self.processes:
            name = name_of(process.cmdline())
            if name is None:
                return
            self.processes[process] = Process(name)
        found = self.processes[process]
        if name_of(process.cmdline()) != found.name:  # a worker of Ray has become a replica
            self.processes[process] = found = Process(name_of(process.cmdline()) or found.name)
        with process.oneshot():
            values = process.memory_info().rss / MB, process.num_fds(), process.num_threads()
        found.times.append(time.monotonic() - self.began)
        found.rss_mb.append(values[0])
        found.descriptors.append(values[1])
        found.threads.append(values[2])


def slope(times: Sequence[float], values: Sequence[float], after_s: float) -> float | None:
    """The slope of the least-squares line through the values after `after_s`, per minute; None for too few values."""
    pairs = [(at, value) for at, value in zip(times, values, strict=True) if at >= after_s]
    if len(pairs) < 10:
        return None
    xs, ys = np.array(pairs, dtype=float).T
    return float(np.polyfit(xs / 60, ys, 1)[0])


def growth(times: Sequence[float], values: Sequence[float], after_s: float) -> float:
    """By how much the median of the last fifth of the values after `after_s` is above that of their first fifth."""
    kept = [value for at, value in zip(times, values, strict=True) if at >= after_s]
    fifth = max(1, len(kept) // 5)
    return float(np.median(kept[-fifth:]) - np.median(kept[:fifth])) if kept else 0.0


BUSY = ("running_sequences", "queue_depth", "kv_usage_ratio", "active_requests")


async def wait_until_all_idle(client: httpx.AsyncClient, seconds: float = 60) -> None:
    """Wait until no request runs or waits anywhere, and no block of a KV cache is in use. Fails with what is left."""

    async def idle() -> bool:
        return not await left()

    async def left() -> dict[tuple[str, str], float]:
        totals = await metric_totals(client)
        return {key: value for key, value in totals.items() if key[0] in BUSY and value}

    try:
        await wait_until(idle, seconds=seconds, every_s=0.5)
    except AssertionError:
        raise AssertionError(f"still {await left()} after {seconds} s") from None


def actors(program: Program) -> dict[str, int]:
    """The number of Ray's running actors by name. A replica has its deployment's name."""
    counts: dict[str, int] = {}
    for process in program.find("ray::"):
        with suppress(psutil.NoSuchProcess):
            name = name_of(process.cmdline())
            if name and not name.startswith("ray::IDLE"):
                counts[name] = counts.get(name, 0) + 1
    return counts


async def actors_again(program: Program, before: dict[str, int], seconds: float = 60) -> None:
    """Wait until the same actors run as before: none is lost, and none is left over."""

    async def same() -> bool:
        return actors(program) == before

    try:
        await wait_until(same, seconds=seconds, every_s=0.5)
    except AssertionError:
        raise AssertionError(f"actors now: {actors(program)}; before: {before}") from None
