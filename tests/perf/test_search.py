"""The search for the highest load, the early stop of probes, objectives and the advice on batch sizes."""

from __future__ import annotations

import random

import pytest

from perf.aggregate import build_stage
from perf.options import parser
from perf.phases import Measurement, PhaseController, Window
from perf.progress import Progress
from perf.records import Record
from perf.results import FindMax, Load, Probe, Stage
from perf.scenarios import ScenarioRunner, advice
from perf.search import MAX_PROBES, EarlyStop, Limit, find_max
from perf.settings import settings
from perf.slo import Slo, SloError
from tests.perf import simulation
from tests.perf.simulation import SimulatedClient

SLO = Slo.parse("ttft_p95<100ms")


async def search(
    capacity: float, start: float, integer: bool = False, highest: float = 1e4, client: float = 1e9
) -> FindMax:
    async def probe(at: float) -> tuple[Probe, Limit]:
        if at > client:
            return Probe(at=at, met=False, why="late"), "client"
        return Probe(at=at, met=at <= capacity, why=""), "none" if at <= capacity else "queue"

    return await find_max("concurrency" if integer else "rate", SLO, start, highest, probe)


@pytest.mark.parametrize("number", range(60))
async def test_search_finds_any_rate_within_5_percent(number: int) -> None:
    """From a start that is wrong by a factor of up to 8."""
    rng = random.Random(number)
    capacity = 10 ** rng.uniform(-0.5, 3)
    found = await search(capacity, capacity * 2 ** rng.uniform(-3, 3))
    assert found.best is not None
    assert capacity / 1.05 <= found.best <= capacity
    assert len(found.probes) <= MAX_PROBES
    assert found.limit == "queue"


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 31, 32, 33, 100, 500])
async def test_search_finds_any_number_of_streams(capacity: int) -> None:
    found = await search(capacity, 1, integer=True)
    assert found.best is not None
    assert float(found.best).is_integer()
    assert capacity / 1.05 <= found.best <= capacity


async def test_search_reports_that_no_load_or_every_load_met_the_slo() -> None:
    nothing = await search(0.001, 4)
    assert nothing.best is None
    assert nothing.broke_at is not None
    everything = await search(1e9, 100, highest=1000)
    assert (everything.best, everything.broke_at, everything.limit) == (1000, None, "none")


async def test_search_ends_after_a_second_client_limited_probe() -> None:
    found = await search(1e9, 10, client=75)
    assert (found.best, found.limit) == (40, "client")
    assert [probe.at for probe in found.probes] == [10, 20, 40, 80, 80]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrival", "capacity"), [pytest.param("constant", 97.56, marks=pytest.mark.long), ("closed", 41)]
)
def test_search_finds_the_capacity_of_a_simulated_server(arrival: str, capacity: float) -> None:
    """40 slots of 410 ms: 97.6 requests per second; or 40 to 42 streams, since a p95 lets a twentieth wait."""
    options = parser()
    line = ["--only", "find-max", "--arrival", arrival, "--slo", "ttft_p95<90ms", "--max-tokens", "8"]
    chosen = settings(options.parse_args([*line, "--duration", "3s"]), options.error)

    async def measure() -> FindMax | None:
        runner = ScenarioRunner(SimulatedClient(0.06, 0.05, slots=40), chosen, Progress())
        await runner.run()
        return runner.find_max

    found = simulation.run(measure())
    assert found is not None
    assert found.best == pytest.approx(capacity, rel=0.05)
    assert found.limit == "queue"
    assert len(found.probes) <= MAX_PROBES


def respond(controller: PhaseController, early_stop: EarlyStop, due: float, first: float) -> None:
    record = controller.start(due)
    assert record is not None
    record.sent = due
    record.arrived(first, 1)
    record.done = first
    controller.finish(record)
    early_stop.on_finish(controller, record)


def test_probe_stops_when_the_slo_is_certainly_missed_and_not_before() -> None:
    now = [0.0]
    controller, early_stop = PhaseController(Window(requests=100, warmup=0), 2), EarlyStop(SLO, 100, lambda: now[0])
    longer = EarlyStop(SLO, 1000, lambda: now[0])
    for number in range(7):
        assert not early_stop.is_missed(controller.unfinished_records)
        respond(controller, early_stop, number, number + 0.2)
        now[0] = number + 0.2
    assert early_stop.is_missed(controller.unfinished_records)
    assert controller.phase == "done", "it was stopped, and no request is in flight"
    assert not longer.is_missed(controller.unfinished_records)


def test_request_that_waits_longer_than_the_limit_counts_as_late() -> None:
    now = [1.05]
    controller, early_stop = PhaseController(Window(requests=100, warmup=0), 2), EarlyStop(SLO, 100, lambda: now[0])
    for _ in range(8):
        controller.start(1.0)
    assert not early_stop.is_missed(controller.unfinished_records)
    now[0] = 1.2
    assert early_stop.is_missed(controller.unfinished_records)


def finished(ttft_s: float, gap_s: float, tokens: int = 3) -> Record:
    record = Record(0.0, sent=0.0, tokens=tokens)
    for number in range(tokens):
        record.arrived(ttft_s + number * gap_s, 1)
    record.done = ttft_s + (tokens - 1) * gap_s
    return record


def test_objective_is_met_if_all_bounds_are_met() -> None:
    slo = Slo.parse(" ttft_p50 < 0.5s, TPOT_p99<=50ms ,e2e_p100<2s,itl_p50<60ms")
    assert str(slo) == "ttft_p50<500ms,tpot_p99<50ms,e2e_p100<2000ms,itl_p50<60ms"
    good, slow = finished(0.1, 0.04), finished(0.1, 0.055)
    assert slo.met_by(good)
    assert not slo.met_by(slow)
    assert slo.missed([good] * 5) == []
    assert slo.missed([good, slow]) == ["tpot_p99 is 54.85 ms, not below 50 ms"]
    assert "ttft_p50 was not measured, not below 500 ms" in slo.missed([])


def test_objective_as_text_can_be_parsed_again() -> None:
    for text in ("e2e_p95<1000000ms", "ttft_p99.99<0.5ms", "tpot_p50<12.25ms"):
        assert str(Slo.parse(str(Slo.parse(text)))) == text


def test_bound_on_tpot_does_not_apply_to_responses_of_one_token() -> None:
    assert Slo.parse("tpot_p95<1ms").missed([finished(0.1, 0, tokens=1)]) == []


def test_failed_request_counts_in_the_percentile_of_gaps() -> None:
    failed = Record(0.0, sent=0.0, done=1.0, error="cut short")
    assert Slo.parse("itl_p99<50ms").missed([finished(0.1, 0.01, tokens=64)] * 9 + [failed])


def test_failed_request_has_infinite_latency() -> None:
    slo = Slo.parse("ttft_p90<500ms")
    failed = Record(0.0, sent=0.0, error="http 500")
    assert slo.missed([finished(0.1, 0.01)] * 19 + [failed]) == []
    assert slo.missed([finished(0.1, 0.01)] * 8 + [failed] * 2) == ["ttft_p90 is inf ms, not below 500 ms"]
    assert not slo.met_by(failed)


@pytest.mark.parametrize(
    "text", ["", "ttft<500ms", "ttft_p95<500", "ttft_p0<1s", "ttft_p101<1s", "speed_p95<1s", "ttft_p95>1s"]
)
def test_invalid_objective_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(SloError, match="ttft_p95<500ms"):
        Slo.parse(text)


def batches(rates: dict[int, int]) -> list[Stage]:
    """One stage per batch size; its call took 1 s and made the given number of tokens."""
    stages = []
    for size, rate in rates.items():
        record = Record(0.0, sent=0.0, done=1.0, tokens=rate, in_window=True)
        measurement = Measurement(opened=0.0, closed=1.001, records=[record], all_records=[record])
        load = Load(loop="closed", arrival="closed", concurrency=1, batch_size=size, streaming=False)
        stages.append(build_stage("batch-profile", f"{size} prompts", load, [measurement]))
    return stages


def test_smallest_batch_with_sufficient_throughput_is_recommended() -> None:
    found = advice(batches({1: 100, 2: 190, 4: 350, 8: 600, 16: 640, 32: 650}))
    assert found is not None
    assert found.recommended == 8
    assert "92%" in found.reason
    growing = advice(batches({1: 100, 2: 200, 4: 400}))
    assert growing is not None
    assert growing.recommended == 4
    assert "a larger size may make more" in growing.reason
