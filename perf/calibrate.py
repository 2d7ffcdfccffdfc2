"""`python -m perf.calibrate`: what this client can carry on this machine, against a golden server beside it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from perf import arrivals, figures, load, loop
from perf.client import Client
from perf.dialects import Native
from perf.exits import Exit
from perf.gate import Gate, Window
from perf.results import Load, Stage
from perf.workload import Workload

STREAMS = (50, 100, 200, 400, 800)
MANY = 1000
RATES = (100.0, 200.0, 400.0, 800.0)
_ITL_MS = 20
_TOKENS = 100


@dataclass(frozen=True)
class Tried:
    """One load on the client. `cpu` is the share of a core that it took, `lag_ms` its event loop's p99."""

    streams: int | None
    rate: float | None
    events_per_s: float
    planned_events_per_s: float
    cpu: float
    lag_ms: float
    delay_ms: float
    failed: int
    limited: bool


@dataclass(frozen=True)
class Capacity:
    """`events_per_s_per_core` is what the dearest load that was carried took of a core, scaled to the whole of it."""

    events_per_s_per_core: float
    open_streams: int
    requests_per_s: float
    tried: list[Tried]


@contextmanager
def golden(*options: str) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "perf.mock", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("answers on ").strip()
        finally:
            process.terminate()


async def calibrate() -> Capacity:
    tried: list[Tried] = []
    with golden("--ttft-ms", "200", "--itl-ms", str(_ITL_MS)) as url:
        for streams in STREAMS:
            tried.append(await _streams(url, streams, streams * 1e3 / _ITL_MS))
            _tell(tried[-1])
            if tried[-1].limited:
                break
    with golden("--ttft-ms", "1000", "--itl-ms", "200") as url:
        many = await _streams(url, MANY, MANY * 5)
        _tell(many)
    with golden("--ttft-ms", "20", "--itl-ms", "5") as url:
        for rate in RATES:
            tried.append(await _rate(url, rate))
            _tell(tried[-1])
            if tried[-1].limited:
                break
    of_streams = [one for one in tried if one.streams is not None]
    carried = [one for one in of_streams if not one.limited] or of_streams
    dearest = max(carried, key=lambda one: one.events_per_s)
    return Capacity(
        events_per_s_per_core=dearest.events_per_s / max(dearest.cpu, 1e-3),
        open_streams=0 if many.failed else MANY,
        requests_per_s=max((one.rate for one in tried if one.rate is not None and not one.limited), default=0.0),
        tried=[*tried, many],
    )


async def _streams(url: str, streams: int, planned: float) -> Tried:
    """Every one of them has one answer that is begun when the window opens."""
    tokens = 25 if streams == MANY else _TOKENS
    stage = await _measure(url, Load(loop="closed", arrival="closed", concurrency=streams), tokens, streams)
    return _tried(stage, planned * tokens / (tokens + (5 if streams == MANY else 10)))


async def _rate(url: str, rate: float) -> Tried:
    stage = await _measure(url, Load(loop="open", arrival="constant", rate=rate), 8, round(rate * 4))
    return _tried(stage, rate * 8)


async def _measure(url: str, asked: Load, tokens: int, requests: int) -> Stage:
    asks = Workload(10, tokens, seed=7).asks("calibrate")
    async with Client(url, Native(None, fixed_length=True), timeout_s=60) as client:
        if asked.loop == "closed":
            streams = asked.concurrency or 1
            gate = Gate(Window(requests=requests * 2, warmup=streams, hold=False), streams)
            measured = await load.closed(client, gate, asks, streams)
        else:
            rate = asked.rate or 1.0
            gate = Gate(Window(requests=requests, warmup=round(rate)), round(rate))
            measured = await load.opened(client, gate, asks, arrivals.constant(rate))
    return figures.stage("find-max", "calibrate", asked, [measured])


def _tried(stage: Stage, planned: float) -> Tried:
    client = stage.client
    return Tried(
        streams=stage.load.concurrency,
        rate=stage.load.rate,
        events_per_s=stage.tokens_per_s,
        planned_events_per_s=planned,
        cpu=client.cpu,
        lag_ms=client.loop_lag_p99_ms,
        delay_ms=client.schedule_delay_p99_ms,
        failed=stage.failed,
        limited=bool(client.limited) or bool(stage.errors),
    )


def _tell(one: Tried) -> None:
    what = f"{one.streams} streams" if one.streams is not None else f"{one.rate:g} requests/s"
    print(
        f"{what:>16}: {one.events_per_s:8.0f} events/s, {one.cpu:4.0%} of a core, late by {one.lag_ms:.1f} ms (p99)"
        + (f", sent {one.delay_ms:.1f} ms late (p99)" if one.rate is not None else "")
        + (f", {one.failed} failed" if one.failed else "")
        + (": too much" if one.limited else ""),
        file=sys.stderr,
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.calibrate",
        description=__doc__,
        epilog="It takes about a minute, and both cores of a small machine: stop what else runs there.",
    )
    parser.add_argument("--json", action="store_true", help="the figures on standard output as JSON")
    asked = parser.parse_args(arguments)
    try:
        capacity = loop.run(calibrate())
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    if asked.json:
        print(json.dumps(asdict(capacity), indent=1))
    else:
        print(
            f"This client reads about {capacity.events_per_s_per_core:.0f} SSE events a second on one core, holds "
            f"{capacity.open_streams} streams open, and sends {capacity.requests_per_s:g} requests a second in time."
        )
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
