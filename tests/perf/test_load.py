"""Measurements of servers whose token times are known, arrival schedules, and the phases of a load."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from perf import arrivals, load, metrics
from perf.dialects import DIALECTS, Api
from perf.mock import MockConfig, running
from perf.phases import Measurement, PhaseController, Window
from perf.records import Record
from perf.workload import Workload
from tests.perf import simulation
from tests.perf.mock_host import MockHost
from tests.perf.simulation import SimulatedClient, client, workload

pytestmark = pytest.mark.perf

# Prints how late timers with the same schedule are in a process that does nothing else.
BARE_TIMERS = """
import asyncio, json, sys
from perf import loop
async def main():
    clock, start, late = asyncio.get_running_loop().time, asyncio.get_running_loop().time(), []
    for number in range(int(sys.argv[1])):
        await asyncio.sleep(max(0, start + number / 200 - clock()))
        late.append((clock() - start - number / 200) * 1e3)
    print(json.dumps(late))
loop.run(main())
"""


async def streams(url: str, count: int, window: Window, api: Api = "native", **size: int) -> Measurement:
    controller = PhaseController(window, count)
    async with client(url, api) as one:
        return await load.closed_loop(one, controller, workload(**size).requests("test"), count)


def ms(values: list[float | None]) -> np.ndarray:
    return np.array([value * 1e3 for value in values if value is not None])


@pytest.mark.usefixtures("awake")
@pytest.mark.parametrize("per_chunk", [1, 4])
async def test_measured_times_and_tokens_are_those_of_the_server(mock: MockHost, per_chunk: int) -> None:
    """All APIs at once, each with 4 streams. The best tenth of the values is exact also on a busy machine."""
    url = mock(ttft_s=0.04, itl_s=0.01, tokens_per_chunk=per_chunk)

    def best_tenth_error(values: np.ndarray, expected: float) -> float:
        return float(np.percentile(np.abs(values - expected), 10))

    runs = (streams(url, 4, Window(requests=40), api, max_tokens=16) for api in DIALECTS)
    for measurement in await asyncio.gather(*runs):
        records = measurement.records
        assert all(record.ok for record in records)
        assert len(records) == 40
        assert {(record.tokens, record.prompt_tokens, sum(record.events)) for record in records} == {(16, 10, 16)}
        assert max(len(record.chunks) for record in records) == 16 // per_chunk
        ttft, service = ms([r.ttft for r in records]), ms([r.service for r in records])
        assert 40 <= ttft.min() <= 42
        assert best_tenth_error(ms([gap for r in records for gap in r.gaps]), 10 * per_chunk) <= 0.5
        assert best_tenth_error(ms([r.tpot for r in records]), 10 * (16 - per_chunk) / 15) <= 0.5
        tokens = sum(r.tokens_within(measurement.opened, measurement.closed) for r in measurement.all_records)
        assert tokens / measurement.window_s == pytest.approx(4 * 16 / service.mean() * 1e3, rel=0.08)


@asynccontextmanager
async def bare_timers(count: int) -> AsyncIterator[list[float]]:
    command = [sys.executable, "-c", BARE_TIMERS, str(count)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    late: list[float] = []
    yield late
    late.extend(json.loads((await process.communicate())[0]))


@pytest.mark.long
async def test_200_requests_per_second_are_sent_as_punctually_as_bare_timers_fire(mock: MockHost) -> None:
    """p50 within 1 ms and p99 within 5 ms of timers in an idle process at the same time; three attempts."""
    url = mock(ttft_s=0.02, itl_s=0.005)
    excess = np.full(2, np.inf)
    for _ in range(3):
        controller = PhaseController(Window(duration_s=5, warmup=200), 200)
        async with bare_timers(1200) as timers, client(url) as one:
            requests = workload(8).requests("test")
            measurement = await load.open_loop(one, controller, requests, arrivals.poisson(200, seed=7))
        assert all(record.ok for record in measurement.records)
        delays = ms([record.sent - record.due for record in measurement.records if record.sent is not None])
        excess = np.percentile(delays, [50, 99]) - np.percentile(timers, [50, 99])
        if (excess <= [1, 5]).all():
            return
    pytest.fail(f"delays exceed those of bare timers by {excess} ms (p50, p99)")


@pytest.mark.parametrize("schedule", ["constant", "poisson"])
def test_open_loop_sends_at_the_times_of_the_schedule(schedule: str) -> None:
    async def measure() -> Measurement:
        due = arrivals.constant(200) if schedule == "constant" else arrivals.poisson(200, seed=7)
        controller = PhaseController(Window(duration_s=5, warmup=200), 200, asyncio.get_running_loop().time)
        return await load.open_loop(SimulatedClient(0.02, 0.005), controller, workload(8).requests("test"), due)

    records = simulation.run(measure()).records
    due, sent = np.array([r.due for r in records]), np.array([r.sent for r in records], float)
    assert_allclose(sent, due, atol=1e-6)
    gaps = np.diff(due)
    if schedule == "constant":
        assert len(due) / 5 == pytest.approx(200, rel=0.01)
        assert gaps.std() / gaps.mean() < 0.05
    else:
        assert scipy.stats.kstest(gaps, "expon", args=(0, 1 / 200)).pvalue > 0.01


def test_every_request_due_in_a_stall_waits_for_its_end() -> None:
    """A client that waits for a response before it sends again would have one slow request, not 20."""

    async def measure() -> Measurement:
        controller = PhaseController(Window(duration_s=4, warmup=10), 20, asyncio.get_running_loop().time)
        server = SimulatedClient(0.01, 0.001, stall=(2.0, 3.0))
        return await load.open_loop(server, controller, workload(2).requests("test"), arrivals.constant(20))

    records = simulation.run(measure()).records
    ttft = metrics.distribution(record.ttft for record in records)
    assert ttft is not None
    assert ttft.p99 >= 900
    assert sum((record.ttft or 0) > 0.12 for record in records) == 18


def test_latency_includes_the_delay_of_a_late_client() -> None:
    """Times from the due time include a pause of the client's event loop; service times do not."""

    async def measure() -> Measurement:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, simulation.VirtualTimeLoop)
        controller = PhaseController(Window(requests=40, warmup=0), 2, loop.time)
        loop.call_later(0.305, lambda: setattr(loop, "now", loop.now + 0.4))
        server = SimulatedClient(0.01, 0.001)
        return await load.open_loop(server, controller, workload(2).requests("test"), arrivals.constant(50))

    late = max(simulation.run(measure()).records, key=lambda r: (r.sent or 0) - r.due)
    assert late.sent is not None
    assert late.sent - late.due > 0.35
    assert (late.ttft or 0) > 0.35
    assert (late.ttft_service or 0) < 0.1


def test_percentiles_are_those_of_numpy() -> None:
    seconds = np.random.default_rng(1).lognormal(-2, 1, 997)
    result = metrics.distribution([*map(float, seconds), None])
    assert result is not None
    assert result.count == 997
    assert_allclose(
        [result.p50, result.p90, result.p95, result.p99, result.mean],
        [*np.percentile(seconds * 1e3, [50, 90, 95, 99]), seconds.mean() * 1e3],
    )
    assert metrics.distribution([None]) is None


@pytest.mark.parametrize(
    ("schedule", "mean", "cv"),
    [
        (arrivals.constant(20), 0.05, 0),
        (arrivals.poisson(20, 3), 0.05, 1),
        (arrivals.gamma(20, 2.5, 3), 0.05, 2.5),
        (arrivals.gamma(20, 0.4, 3), 0.05, 0.4),
        (arrivals.burst(20, 5), 0.05, 2),
    ],
)
def test_arrival_gaps_have_the_requested_mean_and_variation(schedule: Iterator[float], mean: float, cv: float) -> None:
    due = np.array(list(islice(schedule, 30_000)))
    gaps = np.diff(due)
    assert due[0] >= 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(mean, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08, abs=1e-6)


def test_ramp_rises_linearly() -> None:
    due = np.array(list(islice(arrivals.ramp(100, 10), 1500)))
    assert [int(((due >= at) & (due < at + 2)).sum()) for at in (0, 2, 4, 6, 8, 10, 12)] == pytest.approx(
        [20, 60, 100, 140, 180, 200, 200], abs=2
    )


def test_same_seed_gives_the_same_load() -> None:
    schedules: list[Callable[[int], Iterator[float]]] = [partial(arrivals.poisson, 9), partial(arrivals.gamma, 9, 3)]
    for schedule in schedules:
        first, again, other = (np.array(list(islice(schedule(seed), 50))) for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).all()
    assert next(workload().requests("a")) == next(workload().requests("a")) != next(workload().requests("b"))


def finish(controller: PhaseController, record: Record | None, seconds: float, now: list[float]) -> None:
    assert record is not None
    record.sent = record.due
    now[0] += seconds
    record.done = now[0]
    controller.finish(record)


def test_window_opens_when_latency_is_steady_and_not_before() -> None:
    now = [100.0]
    controller = PhaseController(Window(requests=3), 2, clock=lambda: now[0])
    for seconds in (9.0, 5.0, 2.0, 1.0, 1.0, 1.05, 1.0):
        assert controller.phase == "warm-up"
        finish(controller, controller.start(now[0]), seconds, now)
    assert controller.phase == "window"
    assert controller.measurement.steady
    assert controller.measurement.warmup_requests == 7
    assert controller.measurement.opened == now[0]
    for _ in range(3):
        finish(controller, controller.start(now[0]), 1.0, now)
    assert controller.start(now[0]) is None
    assert controller.measurement.window_s == pytest.approx(3)
    assert len(controller.measurement.records) == 3


def test_load_continues_until_the_last_measured_request_is_complete() -> None:
    now = [0.0]
    controller = PhaseController(Window(requests=2, warmup=0), 2, clock=lambda: now[0])
    first, second = controller.start(0), controller.start(0)
    finish(controller, first, 1, now)
    third = controller.start(now[0])
    assert third is not None
    finish(controller, second, 1, now)
    assert controller.measurement.closed == 2
    finish(controller, third, 1, now)
    assert controller.phase == "done"
    assert controller.measurement.closed == 2
    assert [record.in_window for record in controller.measurement.all_records] == [True, True, False]


def test_load_stops_if_every_request_fails() -> None:
    now = [0.0]
    controller = PhaseController(Window(requests=1000), 2, clock=lambda: now[0])
    count = 0
    while (record := controller.start(now[0])) is not None:
        record.error, count = "http 500", count + 1
        controller.finish(record)
    assert count < 50
    assert metrics.errors(controller.measurement.records) == {"http 500": count}
    assert not controller.measurement.steady


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("429", "http 429"),
        ("500", "http 500"),
        ("in-band", "in band internal"),
        ("cut", "cut short"),
        ("hang", "timeout"),
    ],
)
@pytest.mark.parametrize("api", ["native", "openai", "tgi"])
async def test_failures_have_a_kind(error: str, kind: str, api: Api) -> None:
    async with running(MockConfig(errors={error: 1.0})) as url, client(url, api, timeout_s=0.5) as one:
        record = Record(0)
        await one.send(record, next(workload().requests("test")))
    assert record.error == (kind.replace("internal", "generation") if api == "tgi" else kind)
    assert not record.ok


async def test_stream_without_a_token_fails() -> None:
    async def end_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\ndata: [DONE]\n\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(end_at_once, "127.0.0.1", 0) as server:
        async with client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "openai") as one:
            record = Record(0)
            await one.send(record, next(workload().requests("test")))
    assert (record.error, record.ok) == ("no token", False)


async def test_unreachable_server_is_no_connection() -> None:
    async with client("http://127.0.0.1:9") as one:
        record = Record(0)
        await one.send(record, next(workload().requests("test")))
    assert record.error == "no connection"


def test_prompts_of_a_run_share_no_prefix_with_another_run_and_have_the_same_length() -> None:
    def prompts(salt: str) -> list[list[str]]:
        requests = Workload(60, 16, 7, salt=salt).requests("part")
        return [next(requests).prompts[0].split() for _ in range(200)]

    first, second, again = prompts("one"), prompts("two"), prompts("one")
    assert first == again
    assert {len(prompt) for prompt in first + second} == {60}
    assert len({tuple(prompt[:5]) for prompt in first + second}) == 400
    assert [prompt[5:] for prompt in first] == [prompt[5:] for prompt in second]
