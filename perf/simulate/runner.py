"""Runs simulations in parallel processes.

The processes begin with PYTHONHASHSEED=0: the routing table draws replicas from sets of names, whose order depends on
the hashes of texts. With it, the same seed gives the same result.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.pool import Pool
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, ParamSpec, TypeVar

from perf.simulate.cluster import Cluster
from perf.simulate.results import Simulation, summary
from perf.simulate.settings import Job, Traffic
from perf.simulate.traffic import Trace, generate

P = ParamSpec("P")
R = TypeVar("R")

_POLL_S = 0.1
_CONTEXT = multiprocessing.get_context("spawn")
_shares: SynchronizedArray[float]


def run_all(jobs: Sequence[Job], processes: int, progress: Callable[[list[float]], None]) -> list[Simulation]:
    """The results in the order of the jobs. `progress` gets the share of each job that is done.

    Raises KeyboardInterrupt; the processes have ended then.
    """
    shares = _CONTEXT.Array("d", len(jobs))
    with _pool(min(processes, len(jobs)), _begin, (shares,)) as pool:
        running = pool.starmap_async(_run, list(enumerate(jobs)), chunksize=1)
        while not running.ready():
            progress(shares[:])
            time.sleep(_POLL_S)
        return running.get()


def run_apart(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of a function in such a process."""
    with _pool(1) as pool:
        return pool.apply(function, args, kwargs)


def run_one(job: Job, progress: Callable[[float], None] = lambda _: None) -> Simulation:
    trace = _trace(job.traffic, job.seed)
    return summary(job, Cluster(job, trace, lambda now: progress(now / trace.seconds)).run())


@contextmanager
def _pool(
    processes: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[Pool]:
    """New processes with equal hashes of strings, which Ctrl-C does not interrupt: this process ends them.

    A process inherits the mask of signals, so that no signal arrives between its start and its first line of Python.
    """
    with _equal_hashes():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pool = _CONTEXT.Pool(processes, initializer, arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with pool:
            yield pool


@contextmanager
def _equal_hashes() -> Iterator[None]:
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


def _begin(shares: SynchronizedArray[float]) -> None:
    global _shares
    _shares = shares
    # A pass over millions of requests would take seconds, within the decision that it interrupts. There are no cycles.
    gc.disable()


def _run(number: int, job: Job) -> Simulation:
    def progress(share: float) -> None:
        _shares[number] = share

    return run_one(job, progress)


@cache
def _trace(traffic: Traffic, seed: int) -> Trace:
    return generate(traffic, seed)
