"""What a person is told of figures that are given."""

from __future__ import annotations

import pytest

from perf import figures
from perf.gate import Gate, Measured, Window
from perf.progress import line_of
from perf.records import Record
from perf.results import Load, Stage, Tokens
from perf.slo import Slo
from perf.verdict import verdict


def answer(due: float, ttft_s: float, tpot_s: float, tokens: int) -> Record:
    record = Record(due, counts=True, sent=due, tokens=tokens)
    for number in range(tokens):
        record.arrived(due + ttft_s + number * tpot_s, 1)
    record.done = record.chunks[-1]
    return record


def level(streams: int, ttft_s: float, tpot_s: float, slo: str | None = None, failed: int = 0) -> Stage:
    """That many streams, each with one answer of 20 tokens after the other, for some seconds."""
    took, tokens = ttft_s + 19 * tpot_s, 20
    records = [answer(turn * took, ttft_s, tpot_s, tokens) for turn in range(5) for _ in range(streams)]
    records += [Record(0.0, counts=True, sent=0.0, done=0.1, error="http 429") for _ in range(failed)]
    measured = Measured(opened=0.0, closed=5 * took + 1e-6, records=records, everybody=records)
    asked = Load(loop="closed", arrival="closed", concurrency=streams)
    objective = Slo.parse(slo) if slo is not None else None
    return figures.stage("concurrency", f"{streams} streams", asked, [measured], None, objective)


def counted(client: int, server: int | None, **metrics: float) -> Tokens:
    return Tokens(
        scenario="concurrency", client=client, server=server, client_requests=1, server_requests=1,
        server_metrics=metrics,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "last", "metrics", "sentence", "advice"),
    [
        # Tokens come as fast as before, the first one a second later.
        ((8, 0.1, 0.01), (32, 1.1, 0.01), {}, "The queue was the limit", "engine.max_running"),
        # Four times the streams, each at a quarter of the pace.
        ((8, 0.1, 0.01), (32, 0.4, 0.04), {}, "Compute was the limit", "quantization: int8"),
        ((8, 0.1, 0.01), (32, 0.11, 0.011), {}, "No limit was reached", "--concurrency 64 128"),
        ((8, 0.1, 0.01), (32, 0.4, 0.04), {"preemptions": 3.0}, "Memory was the limit: 3", "kv_memory_fraction"),
    ],
)
def test_the_limit_is_named_with_what_to_try(
    before: tuple[int, float, float],
    last: tuple[int, float, float],
    metrics: dict[str, float],
    sentence: str,
    advice: str,
) -> None:
    told = verdict([level(*before), level(*last)], [counted(1, 1, **metrics)], None, None)
    assert [one for one in told.sentences if one.startswith(sentence)], told.sentences
    assert [one for one in told.recommendations if advice in one], told.recommendations
    assert told.exit_code == 0


def test_an_objective_is_told_up_to_where_it_holds() -> None:
    slo = "ttft_p95<500ms"
    stages = [level(8, 0.1, 0.01, slo), level(16, 0.2, 0.01, slo), level(32, 0.9, 0.01, slo)]
    told = verdict(stages, [], None, None)
    assert f"{slo} holds up to 16 streams and is missed at 32 streams: ttft_p95 is 900 ms" in " ".join(told.sentences)
    assert told.exit_code == 1
    assert verdict(stages[:2], [], None, None).exit_code == 0
    assert "holds at every load that was tried, up to 16 streams" in " ".join(
        verdict(stages[:2], [], None, None).sentences
    )


def test_failures_are_told_by_kind_and_fail() -> None:
    told = verdict([level(8, 0.1, 0.01, failed=3)], [], None, None)
    assert told.exit_code == 1
    assert told.reasons == ["3 of 43 requests failed: http 429 (3)"]


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([counted(100, 100)], "Client and server counted the same 100 tokens."),
        ([counted(100, 104)], "The server counted 4 tokens more than the client's 100"),
        ([counted(100, 90)], "The server counted 10 tokens fewer than the client's 100"),
        ([counted(100, None)], "The server has no token counter that is known here, or was restarted"),
    ],
)
def test_both_counts_are_held_against_each_other(tokens: list[Tokens], sentence: str) -> None:
    assert [one for one in verdict([], tokens, None, None).sentences if one.startswith(sentence)]


def test_a_line_tells_how_far_it_is() -> None:
    now = [0.0]
    gate = Gate(Window(requests=4, warmup=1), 2, clock=lambda: now[0])
    warming = gate.due(0.0)
    assert warming is not None
    assert line_of("x", gate, 0.0) == "x: warming up, 1 requests, 1 in flight"
    warming.done = now[0] = 1.0
    gate.ended(warming)
    for _ in range(2):
        record = gate.due(now[0])
        assert record is not None
        record.sent = now[0]
        record.arrived(now[0] + 0.25, 1)
        record.tokens, record.done = 1, now[0] + 0.5
        now[0] += 0.5
        gate.ended(record)
    assert line_of("x", gate, now[0]) == "x: 50%, 0 in flight, 2 tok/s, TTFT 250, p95 250 ms, 1 s left"
