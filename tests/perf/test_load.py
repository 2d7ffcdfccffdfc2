"""What the client measures of a server whose times are known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from perf import arrivals, load, metrics
from perf.dialects import Api
from perf.gate import Gate, Measured, Window
from perf.records import Record
from perf.workload import Workload

from .golden import client, golden, workload

pytestmark = pytest.mark.perf


async def streams(url: str, count: int, window: Window, api: Api = "native", **asked: int) -> Measured:
    async with client(url, api) as one:
        return await load.closed(one, Gate(window, count), workload(**asked).asks("test"), count)


async def at_rate(url: str, rate: float, window: Window, schedule: str = "constant", **asked: int) -> Measured:
    due = arrivals.constant(rate) if schedule == "constant" else arrivals.poisson(rate, seed=7)
    async with client(url) as one:
        return await load.opened(one, Gate(window, round(rate)), workload(**asked).asks("test"), due)


async def undisturbed(measure: Callable[[], Awaitable[Measured]], held: Callable[[Measured], bool]) -> Measured:
    """What this client can do it has done once: a machine that was busy with something else has three tries."""
    for _ in range(3):
        measured = await measure()
        if held(measured):
            break
    return measured


def delays(measured: Measured) -> np.ndarray:
    """Due to sent, in ms."""
    return ms([record.sent - record.due for record in measured.records if record.sent is not None])


def ms(values: list[float | None]) -> np.ndarray:
    return np.array([value * 1e3 for value in values if value is not None])


@pytest.mark.parametrize("api", ["native", "openai", "tgi"])
@pytest.mark.parametrize("per_chunk", [1, 4])
async def test_times_and_tokens_are_those_of_the_server(api: Api, per_chunk: int) -> None:
    async def measure() -> Measured:
        return await streams(url, 4, Window(requests=40), api, max_tokens=16)

    with golden("--ttft-ms", "40", "--itl-ms", "10", "--tokens-per-chunk", str(per_chunk)) as url:
        measured = await undisturbed(measure, lambda measured: np.median(ms([r.ttft for r in measured.records])) <= 42)
    records = measured.records
    assert all(record.ok for record in records)
    assert len(records) == 40
    assert {(record.tokens, record.prompt_tokens, sum(record.events)) for record in records} == {(16, 10, 16)}
    assert np.median([len(record.chunks) for record in records]) == 16 // per_chunk
    ttft, gaps = ms([r.ttft for r in records]), ms([gap for r in records for gap in r.gaps])
    tpot = ms([r.tpot for r in records])
    assert ttft.min() >= 40
    assert np.median(ttft) <= 42
    assert abs(np.median(gaps) - 10 * per_chunk) <= 1
    assert abs(np.median(tpot) - 10 * (16 - per_chunk) / 15) <= 1
    wanted = 4 * 16 / (0.040 + 0.010 * (16 - per_chunk))
    told = sum(r.tokens_within(measured.opened, measured.closed) for r in measured.everybody) / measured.window_s
    assert told == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize("schedule", ["constant", "poisson"])
async def test_200_requests_a_second_are_200(schedule: str) -> None:
    async def measure() -> Measured:
        return await at_rate(url, 200, Window(duration_s=5, warmup=200), schedule, max_tokens=8)

    with golden("--ttft-ms", "20", "--itl-ms", "5") as url:
        measured = await undisturbed(measure, lambda measured: np.percentile(delays(measured), 99) <= 5)
    assert all(record.ok for record in measured.records)
    median, late = np.percentile(delays(measured), [50, 99])
    assert median <= 1
    assert late <= 5
    due = np.array([record.due for record in measured.records])
    sent = np.array([record.sent for record in measured.records], float)
    # In how much time they were due, and sent, whatever the schedule drew.
    assert (sent[-1] - sent[0]) == pytest.approx(due[-1] - due[0], rel=0.01)
    gaps = np.diff(due)
    if schedule == "constant":
        assert len(due) / 5 == pytest.approx(200, rel=0.01)
        assert gaps.std() / gaps.mean() < 0.05
    else:
        assert scipy.stats.kstest(gaps, "expon", args=(0, 1 / 200)).pvalue > 0.01


async def test_a_pause_of_the_server_is_seen_by_everybody_who_was_due_in_it() -> None:
    """A client that waits for its answers before it asks again would have one request in the pause, not 20."""
    with golden("--ttft-ms", "10", "--itl-ms", "1", "--stall-ms", "1000", "--stall-at-s", "2") as url:
        measured = await at_rate(url, 20, Window(duration_s=4, warmup=10), max_tokens=2)
    ttft = metrics.distribution(r.ttft for r in measured.records)
    assert ttft is not None
    assert ttft.p99 >= 900
    assert sum((record.ttft or 0) > 0.1 for record in measured.records) == pytest.approx(18, abs=2)


async def test_a_late_client_does_not_make_the_server_faster() -> None:
    """Its own pause is in the latency from the instant that was due, and not in the service time."""
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        async with client(url) as one:
            gate = Gate(Window(requests=40, warmup=0), 2)
            blocking = asyncio.create_task(asyncio.sleep(0.3))
            blocking.add_done_callback(lambda _: time.sleep(0.4))
            measured = await load.opened(one, gate, workload(2).asks("test"), arrivals.constant(50))
    late = max(measured.records, key=lambda r: (r.sent or 0) - r.due)
    assert late.sent is not None
    assert late.sent - late.due > 0.35
    assert (late.ttft or 0) > 0.35
    assert (late.ttft_service or 0) < 0.1


def test_percentiles_are_numpys() -> None:
    seconds = np.random.default_rng(1).lognormal(-2, 1, 997)
    told = metrics.distribution([*map(float, seconds), None])
    assert told is not None
    assert told.count == 997
    assert_allclose(
        [told.p50, told.p90, told.p95, told.p99, told.mean],
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
def test_gaps_are_as_they_were_asked_for(schedule: Iterator[float], mean: float, cv: float) -> None:
    due = np.array(list(islice(schedule, 30_000)))
    gaps = np.diff(due)
    assert due[0] >= 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(mean, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08, abs=1e-6)


def test_a_ramp_rises_in_a_straight_line() -> None:
    due = np.array(list(islice(arrivals.ramp(100, 10), 1500)))
    assert [int(((due >= at) & (due < at + 2)).sum()) for at in (0, 2, 4, 6, 8, 10, 12)] == pytest.approx(
        [20, 60, 100, 140, 180, 200, 200], abs=2
    )


def test_the_same_seed_is_the_same_load() -> None:
    makers: list[Callable[[int], Iterator[float]]] = [partial(arrivals.poisson, 9), partial(arrivals.gamma, 9, 3)]
    for make in makers:
        first, again, other = (np.array(list(islice(make(seed), 50))) for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).all()
    assert next(workload().asks("a")) == next(workload().asks("a")) != next(workload().asks("b"))


def ended(gate: Gate, record: Record | None, took: float, now: list[float]) -> None:
    assert record is not None
    record.sent = record.due
    now[0] += took
    record.done = now[0]
    gate.ended(record)


def test_a_window_opens_when_latency_has_settled_and_not_before() -> None:
    now = [100.0]
    gate = Gate(Window(requests=3), 2, clock=lambda: now[0])
    for took in (9.0, 5.0, 2.0, 1.0, 1.0, 1.05, 1.0):
        assert gate.phase == "warm-up"
        ended(gate, gate.due(now[0]), took, now)
    assert gate.phase == "window"
    assert gate.measured.steady
    assert gate.measured.warmup_requests == 7
    assert gate.measured.opened == now[0]
    for _ in range(3):
        ended(gate, gate.due(now[0]), 1.0, now)
    assert gate.due(now[0]) is None
    assert gate.measured.window_s == pytest.approx(3)
    assert len(gate.measured.records) == 3


def test_the_load_goes_on_until_the_last_that_counts_has_its_answer() -> None:
    now = [0.0]
    gate = Gate(Window(requests=2, warmup=0), 2, clock=lambda: now[0])
    first, second = gate.due(0), gate.due(0)
    ended(gate, first, 1, now)
    third = gate.due(now[0])
    assert third is not None
    ended(gate, second, 1, now)
    assert gate.measured.closed == 2
    ended(gate, third, 1, now)
    assert gate.phase == "over"
    assert gate.measured.closed == 2
    assert [record.counts for record in gate.measured.everybody] == [True, True, False]


def test_a_server_that_only_fails_is_left_in_peace() -> None:
    now = [0.0]
    gate = Gate(Window(requests=1000), 2, clock=lambda: now[0])
    count = 0
    while (record := gate.due(now[0])) is not None:
        record.error, count = "http 500", count + 1
        gate.ended(record)
    assert count < 50
    assert metrics.errors(gate.measured.records) == {"http 500": count}
    assert not gate.measured.steady


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--errors", "429:1"], "http 429"),
        (["--errors", "500:1"], "http 500"),
        (["--errors", "in-band:1"], "in band internal"),
        (["--errors", "cut:1"], "cut short"),
        (["--errors", "hang:1"], "timeout"),
    ],
)
@pytest.mark.parametrize("api", ["native", "openai", "tgi"])
async def test_failures_are_told_by_their_kind(options: list[str], kind: str, api: Api) -> None:
    with golden(*options) as url:
        async with client(url, api, timeout_s=0.5) as one:
            record = Record(0)
            await one.send(record, next(workload().asks("test")))
    assert record.error == (kind.replace("internal", "generation") if api == "tgi" else kind)
    assert not record.ok


async def test_a_stream_without_a_token_is_no_success() -> None:
    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\ndata: [DONE]\n\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(nothing, "127.0.0.1", 0) as server:
        async with client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "openai") as one:
            record = Record(0)
            await one.send(record, next(workload().asks("test")))
    assert (record.error, record.ok) == ("no token", False)


async def test_nobody_there_is_told_so() -> None:
    async with client("http://127.0.0.1:9") as one:
        record = Record(0)
        await one.send(record, next(workload().asks("test")))
    assert record.error == "no connection"


def test_prompts_of_a_run_begin_as_no_others_and_are_as_long() -> None:
    def prompts(salt: str) -> list[list[str]]:
        asks = Workload(60, 16, 7, salt=salt).asks("part")
        return [next(asks).prompts[0].split() for _ in range(200)]

    first, second, again = prompts("one"), prompts("two"), prompts("one")
    assert first == again
    assert {len(prompt) for prompt in first + second} == {60}
    assert len({tuple(prompt[:5]) for prompt in first + second}) == 400
    assert [prompt[5:] for prompt in first] == [prompt[5:] for prompt in second]
