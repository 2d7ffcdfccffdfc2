"""Sentences, recommendations and exit code for given metrics."""

from __future__ import annotations

import pytest

from perf.aggregate import build_stage
from perf.metrics import timeline
from perf.phases import Measurement, PhaseController, Window
from perf.progress import status_line
from perf.records import Record
from perf.results import Load, Stage, Tokens
from perf.slo import Slo
from perf.stages import load
from perf.verdict import Tuning, verdict


def response(due: float, ttft_s: float, tpot_s: float, tokens: int) -> Record:
    record = Record(due, in_window=True, sent=due, tokens=tokens)
    for number in range(tokens):
        record.arrived(due + ttft_s + number * tpot_s, 1)
    record.done = record.chunks[-1]
    return record


def level(streams: int, ttft_s: float, tpot_s: float, slo: str | None = None, failed: int = 0) -> Stage:
    """Five responses of 20 tokens in each stream."""
    service_s, tokens = ttft_s + 19 * tpot_s, 20
    records = [response(turn * service_s, ttft_s, tpot_s, tokens) for turn in range(5) for _ in range(streams)]
    records += [Record(0.0, in_window=True, sent=0.0, done=0.1, error="http 429") for _ in range(failed)]
    measurement = Measurement(opened=0.0, closed=5 * service_s + 1e-6, records=records, all_records=records)
    load = Load(loop="closed", arrival="closed", concurrency=streams)
    objective = Slo.parse(slo) if slo is not None else None
    return build_stage("concurrency", f"{streams} streams", load, [measurement], None, objective)


def counted(client: int, server: int | None, **metrics: float) -> Tokens:
    return Tokens(
        scenario="concurrency", client=client, server=server, client_requests=1, server_requests=1,
        server_metrics=metrics,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "last", "metrics", "sentence", "advice"),
    [
        # The same TPOT, TTFT 1 s longer.
        ((8, 0.1, 0.01), (32, 1.1, 0.01), {}, "The queue was the limit", "engine.max_running"),
        # Four times the streams, each with a quarter of the speed.
        ((8, 0.1, 0.01), (32, 0.4, 0.04), {}, "Compute was the limit", "quantization: int8"),
        (
            (8, 0.1, 0.01),
            (32, 0.4, 0.04),
            {"rows": 100.0, "prompt_tokens": 90.0, "cached_prompt_tokens": 50.0},
            "Compute was the limit",
            "quantization: int8",
        ),
        (
            (8, 0.1, 0.01),
            (32, 0.4, 0.04),
            {"rows": 100.0, "prompt_tokens": 90.0, "cached_prompt_tokens": 10.0},
            "The computation of prompts was the limit",
            "shorter prompts",
        ),
        ((8, 0.1, 0.01), (32, 0.11, 0.011), {}, "No limit was reached", "--concurrency 64 128"),
        ((8, 0.1, 0.01), (32, 0.4, 0.04), {"preemptions": 3.0}, "Memory was the limit: 3", "kv_memory_fraction"),
    ],
)
def test_limit_is_named_with_a_recommendation(
    before: tuple[int, float, float],
    last: tuple[int, float, float],
    metrics: dict[str, float],
    sentence: str,
    advice: str,
) -> None:
    result = verdict([level(*before), level(*last)], [counted(1, 1, **metrics)], None, None)
    assert [text for text in result.sentences if text.startswith(sentence)], result.sentences
    assert [text for text in result.recommendations if advice in text], result.recommendations
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("tuning", "advice"),
    [
        (Tuning(quantization="none"), "Try quantization: int8, faster hardware or more replicas."),
        (Tuning(quantization=None), "Try quantization: int8, faster hardware or more replicas."),
        (Tuning(quantization="int8"), "The weights are int8 already: try faster hardware or more replicas."),
        (Tuning(is_serve_app=False), "Try quantization, faster hardware or more replicas."),
    ],
)
def test_what_the_server_does_already_is_not_recommended(tuning: Tuning, advice: str) -> None:
    result = verdict([level(8, 0.1, 0.01), level(32, 0.4, 0.04)], [], None, None, tuning)
    assert advice in result.recommendations


def test_objective_is_reported_up_to_the_load_that_meets_it() -> None:
    slo = "ttft_p95<500ms"
    stages = [level(8, 0.1, 0.01, slo), level(16, 0.2, 0.01, slo), level(32, 0.9, 0.01, slo)]
    result = verdict(stages, [], None, None)
    assert f"{slo} is met up to 16 streams and missed at 32 streams: ttft_p95 is 900 ms" in " ".join(result.sentences)
    assert result.exit_code == 1
    assert verdict(stages[:2], [], None, None).exit_code == 0
    assert "is met at every load up to 16 streams" in " ".join(verdict(stages[:2], [], None, None).sentences)


def test_failures_are_counted_by_kind_and_fail_the_run() -> None:
    result = verdict([level(8, 0.1, 0.01, failed=3)], [], None, None)
    assert result.exit_code == 1
    assert result.reasons == ["3 of 43 requests failed: http 429 (3)"]


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([counted(100, 100)], "Client and server counted the same 100 tokens."),
        ([counted(100, 104)], "The server counted 4 tokens more than the client's 100"),
        ([counted(100, 90)], "The server counted 10 tokens fewer than the client's 100"),
        ([counted(100, None)], "The server has no known token counter or was restarted"),
    ],
)
def test_token_counts_of_client_and_server_are_compared(tokens: list[Tokens], sentence: str) -> None:
    assert [text for text in verdict([], tokens, None, None).sentences if text.startswith(sentence)]


def test_status_line_shows_the_progress() -> None:
    now = [0.0]
    controller = PhaseController(Window(requests=4, warmup=1), 2, clock=lambda: now[0])
    warmup = controller.start(0.0)
    assert warmup is not None
    assert status_line("x", controller, 0.0) == "x: warm-up, 1 requests, 1 in flight"
    warmup.done = now[0] = 1.0
    controller.finish(warmup)
    for _ in range(2):
        record = controller.start(now[0])
        assert record is not None
        record.sent = now[0]
        record.arrived(now[0] + 0.25, 1)
        record.tokens, record.done = 1, now[0] + 0.5
        now[0] += 0.5
        controller.finish(record)
    assert status_line("x", controller, now[0]) == "x: 50%, 0 in flight, 2 tok/s, TTFT p50 250 ms, p95 250 ms, 1 s left"


def test_the_progress_of_a_late_window_is_the_whole() -> None:
    controller = PhaseController(Window(duration_s=1.0, warmup=0), 1, clock=lambda: 0.0)
    controller.start(0.0)
    assert status_line("x", controller, 1.5).startswith("x: 100%, 1 in flight")


def test_windows_that_were_not_steady_are_named() -> None:
    steady = level(8, 0.1, 0.01).model_copy(update={"steady": True})
    rising = level(32, 0.1, 0.01).model_copy(update={"steady": False})
    unknown = level(64, 0.1, 0.01).model_copy(update={"steady": None})
    (sentence,) = [
        text for text in verdict([steady, rising, unknown], [], None, None).recommendations if "steady" in text
    ]
    assert "32 streams" in sentence
    assert "8 streams" not in sentence
    assert "64 streams" not in sentence


@pytest.mark.parametrize(
    ("prompts", "words"), [(1, "closed loop, 8 streams"), (2, "closed loop, 8 streams, 2 prompts")]
)
def test_the_load_in_words_has_the_prompts_of_a_batch(prompts: int, words: str) -> None:
    stage = level(8, 0.1, 0.01)
    described = load(stage.model_copy(update={"load": stage.load.model_copy(update={"batch_size": prompts})}))
    assert described == words + (" per request" if prompts > 1 else "")


def test_a_request_is_in_flight_from_the_second_in_which_it_is_sent() -> None:
    request = Record(0.0, in_window=True, sent=1.0, done=2.5)
    assert [second.in_flight for second in timeline([request], 0.0, 4.0)] == [0, 1, 0, 0]
