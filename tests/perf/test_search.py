"""The search for the highest load, against servers whose capacity is known."""

from __future__ import annotations

import random

import pytest

from perf import figures
from perf.gate import Gate, Measured, Window
from perf.records import Record
from perf.results import FindMax, Load, Probe, Stage
from perf.scenarios import advice
from perf.search import MAX_PROBES, Hope, Limit, find_max
from perf.slo import Slo, SloError

SLO = Slo.parse("ttft_p95<100ms")


async def search(
    capacity: float, start: float, whole: bool = False, highest: float = 1e4, client: float = 1e9
) -> FindMax:
    async def probe(at: float) -> tuple[Probe, Limit]:
        if at > client:
            return Probe(at=at, met=False, why="late"), "client"
        return Probe(at=at, met=at <= capacity, why=""), "none" if at <= capacity else "queue"

    return await find_max("concurrency" if whole else "rate", SLO, start, highest, probe)


@pytest.mark.parametrize("number", range(60))
async def test_any_rate_is_found_within_a_twentieth(number: int) -> None:
    """From a guess that is off by up to 8 times."""
    rng = random.Random(number)
    capacity = 10 ** rng.uniform(-0.5, 3)
    found = await search(capacity, capacity * 2 ** rng.uniform(-3, 3))
    assert found.best is not None
    assert capacity / 1.05 <= found.best <= capacity
    assert len(found.probes) <= MAX_PROBES
    assert found.limit == "queue"


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 31, 32, 33, 100, 500])
async def test_a_number_of_streams_is_found(capacity: int) -> None:
    found = await search(capacity, 1, whole=True)
    assert found.best is not None
    assert float(found.best).is_integer()
    assert capacity / 1.05 <= found.best <= capacity


async def test_what_cannot_be_found_is_told() -> None:
    nothing = await search(0.001, 4)
    assert nothing.best is None
    assert nothing.broke_at is not None
    everything = await search(1e9, 100, highest=1000)
    assert (everything.best, everything.broke_at, everything.limit) == (1000, None, "none")


async def test_a_client_that_breaks_ends_the_search() -> None:
    found = await search(1e9, 10, client=75)
    assert (found.best, found.limit) == (40, "client")
    assert [probe.at for probe in found.probes] == [10, 20, 40, 80, 80]


def answered(gate: Gate, hope: Hope, due: float, first: float) -> None:
    record = gate.due(due)
    assert record is not None
    record.sent = due
    record.arrived(first, 1)
    record.done = first
    gate.ended(record)
    hope.ended(gate, record)


def test_a_probe_ends_when_it_is_lost_and_not_before() -> None:
    now = [0.0]
    gate, hope = Gate(Window(requests=100, warmup=0), 2), Hope(SLO, 100, lambda: now[0])
    longer = Hope(SLO, 1000, lambda: now[0])
    for number in range(7):
        assert not hope.is_lost(gate.under_way)
        answered(gate, hope, number, number + 0.2)
        now[0] = number + 0.2
    assert hope.is_lost(gate.under_way)
    assert gate.phase == "over", "it was stopped, and nobody is under way"
    assert not longer.is_lost(gate.under_way)


def test_who_waits_too_long_already_counts() -> None:
    now = [1.05]
    gate, hope = Gate(Window(requests=100, warmup=0), 2), Hope(SLO, 100, lambda: now[0])
    for _ in range(8):
        gate.due(1.0)
    assert not hope.is_lost(gate.under_way)
    now[0] = 1.2
    assert hope.is_lost(gate.under_way)


def finished(ttft_s: float, gap_s: float, tokens: int = 3) -> Record:
    record = Record(0.0, sent=0.0, tokens=tokens)
    for number in range(tokens):
        record.arrived(ttft_s + number * gap_s, 1)
    record.done = ttft_s + (tokens - 1) * gap_s
    return record


def test_an_objective_is_judged_by_all_its_bounds() -> None:
    slo = Slo.parse(" ttft_p50 < 0.5s, TPOT_p99<=50ms ,e2e_p100<2s,itl_p50<60ms")
    assert str(slo) == "ttft_p50<500ms,tpot_p99<50ms,e2e_p100<2000ms,itl_p50<60ms"
    good, slow = finished(0.1, 0.04), finished(0.1, 0.055)
    assert slo.met_by(good)
    assert not slo.met_by(slow)
    assert slo.missed([good] * 5) == []
    assert slo.missed([good, slow]) == ["tpot_p99 is 54.85 ms, not below 50 ms"]
    assert "ttft_p50 was not measured, not below 500 ms" in slo.missed([])


def test_an_objective_can_be_read_again_as_it_is_written() -> None:
    for text in ("e2e_p95<1000000ms", "ttft_p99.99<0.5ms", "tpot_p50<12.25ms"):
        assert str(Slo.parse(str(Slo.parse(text)))) == text


def test_answers_of_one_token_have_no_pace_to_miss() -> None:
    assert Slo.parse("tpot_p95<1ms").missed([finished(0.1, 0, tokens=1)]) == []


def test_gaps_of_a_request_that_failed_count_too() -> None:
    failed = Record(0.0, sent=0.0, done=1.0, error="cut short")
    assert Slo.parse("itl_p99<50ms").missed([finished(0.1, 0.01, tokens=64)] * 9 + [failed])


def test_a_request_that_failed_took_for_ever() -> None:
    slo = Slo.parse("ttft_p90<500ms")
    failed = Record(0.0, sent=0.0, error="http 500")
    assert slo.missed([finished(0.1, 0.01)] * 19 + [failed]) == []
    assert slo.missed([finished(0.1, 0.01)] * 8 + [failed] * 2) == ["ttft_p90 is inf ms, not below 500 ms"]
    assert not slo.met_by(failed)


@pytest.mark.parametrize(
    "text", ["", "ttft<500ms", "ttft_p95<500", "ttft_p0<1s", "ttft_p101<1s", "speed_p95<1s", "ttft_p95>1s"]
)
def test_what_is_no_objective_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(SloError, match="ttft_p95<500ms"):
        Slo.parse(text)


def batches(rates: dict[int, int]) -> list[Stage]:
    """A call of each size, that took a second and made so many tokens."""
    made = []
    for size, rate in rates.items():
        record = Record(0.0, sent=0.0, done=1.0, tokens=rate, counts=True)
        measured = Measured(opened=0.0, closed=1.001, records=[record], everybody=[record])
        asked = Load(loop="closed", arrival="closed", concurrency=1, batch_size=size, streaming=False)
        made.append(figures.stage("batch-profile", f"{size} prompts", asked, [measured]))
    return made


def test_the_smallest_batch_that_pays_is_recommended() -> None:
    found = advice(batches({1: 100, 2: 190, 4: 350, 8: 600, 16: 640, 32: 650}))
    assert found is not None
    assert found.recommended == 8
    assert "92%" in found.reason
    growing = advice(batches({1: 100, 2: 200, 4: 400}))
    assert growing is not None
    assert growing.recommended == 4
    assert "a larger one may make more" in growing.reason
