"""`python -m perf.calibrate`: measures how much load the client can generate on this machine, with a mock server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from perf import arrivals, load, loop
from perf.aggregate import build_stage
from perf.client import Client
from perf.dialects import Native
from perf.exits import Exit
from perf.mock import mock_server
from perf.phases import PhaseController, Window
from perf.results import Load, Stage
from perf.workload import Workload

STREAMS = (50, 100, 200, 400, 800)
MANY_STREAMS = 1000
RATES = (100.0, 200.0, 400.0, 800.0)
_ITL_MS = 20
_MANY_STREAMS_ITL_MS = 200


@dataclass(frozen=True)
class Trial:
    """One load. `cpu`: share of a core that the client used; `lag_ms`: p99 lateness of its event loop."""

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
    """`events_per_s_per_core`: events per second over CPU share, at the highest load that was not client-limited."""

    events_per_s_per_core: float
    open_streams: int
    requests_per_s: float
    tried: list[Trial]


async def calibrate(streams: Sequence[int] = STREAMS, rates: Sequence[float] = RATES) -> Capacity:
    """Tries increasing loads until one is client-limited, and MANY_STREAMS open streams once."""
    stream_trials: list[Trial] = []
    with mock_server("--ttft-ms", "200", "--itl-ms", str(_ITL_MS)) as url:
        for count in streams:
            stream_trials.append(await try_streams(url, count, tokens=100, itl_ms=_ITL_MS))
            if stream_trials[-1].limited:
                break
    with mock_server("--ttft-ms", "1000", "--itl-ms", str(_MANY_STREAMS_ITL_MS)) as url:
        many = await try_streams(url, MANY_STREAMS, tokens=25, itl_ms=_MANY_STREAMS_ITL_MS)
    rate_trials: list[Trial] = []
    with mock_server("--ttft-ms", "20", "--itl-ms", "5") as url:
        for rate in rates:
            rate_trials.append(await try_rate(url, rate))
            if rate_trials[-1].limited:
                break
    sustained = [trial for trial in stream_trials if not trial.limited] or stream_trials
    highest = max(sustained, key=lambda trial: trial.events_per_s)
    return Capacity(
        events_per_s_per_core=highest.events_per_s / max(highest.cpu, 1e-3),
        open_streams=0 if many.failed else MANY_STREAMS,
        requests_per_s=max((trial.rate for trial in rate_trials if trial.rate and not trial.limited), default=0.0),
        tried=[*stream_trials, *rate_trials, many],
    )


async def try_streams(url: str, streams: int, tokens: int, itl_ms: float) -> Trial:
    """Measures two responses per stream, after one per stream as warm-up. TTFT lasts as long as 10 or 5 tokens."""
    closed = Load(loop="closed", arrival="closed", concurrency=streams)
    window = Window(requests=streams * 2, warmup=streams, cooldown=False)
    ttft_tokens = 5 if streams == MANY_STREAMS else 10
    planned = streams * 1e3 / itl_ms * tokens / (tokens + ttft_tokens)
    return _report(await _measure(url, closed, PhaseController(window, streams), tokens), planned)


async def try_rate(url: str, rate: float) -> Trial:
    window = Window(requests=round(rate * 4), warmup=round(rate))
    open_load = Load(loop="open", arrival="constant", rate=rate)
    return _report(await _measure(url, open_load, PhaseController(window, round(rate)), tokens=8), rate * 8)


async def _measure(url: str, offered: Load, controller: PhaseController, tokens: int) -> Stage:
    requests = Workload(10, tokens, seed=7).requests("calibrate")
    async with Client(url, Native(None, fixed_length=True), timeout_s=60) as client:
        if offered.loop == "closed":
            measurement = await load.closed_loop(client, controller, requests, offered.concurrency or 1)
        else:
            measurement = await load.open_loop(client, controller, requests, arrivals.constant(offered.rate or 1.0))
    return build_stage("find-max", "calibrate", offered, [measurement])


def _report(stage: Stage, planned: float) -> Trial:
    """Prints the trial on standard error."""
    client = stage.client
    trial = Trial(
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
    name = f"{trial.streams} streams" if trial.streams is not None else f"{trial.rate:g} requests/s"
    print(
        f"{name:>16}: {trial.events_per_s:8.0f} events/s, {trial.cpu:4.0%} of a core, timers late by "
        f"{trial.lag_ms:.1f} ms (p99)"
        + (f", sent {trial.delay_ms:.1f} ms late (p99)" if trial.rate is not None else "")
        + (f", {trial.failed} failed" if trial.failed else "")
        + (": client-limited" if trial.limited else ""),
        file=sys.stderr,
        flush=True,
    )
    return trial


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.calibrate",
        description=__doc__,
        epilog="It takes about a minute and two cores: stop other programs first.",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON on standard output")
    args = parser.parse_args(arguments)
    try:
        capacity = loop.run(calibrate())
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    if args.json:
        print(json.dumps(asdict(capacity), indent=1))
    else:
        print(
            f"This client reads about {capacity.events_per_s_per_core:.0f} SSE events per second on one core, holds "
            f"{capacity.open_streams} streams open, and sends {capacity.requests_per_s:g} requests per second on time."
        )
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
