"""What is counted of an engine's steps."""

from __future__ import annotations

import pytest

from serve_app.engines.native.sequence import Advance, Step
from serve_app.telemetry.metrics import StepSeries
from tests.engines.native.helpers import sequence


def step(*counts: int) -> Step:
    return Step(tuple(Advance(sequence("abcdefgh"), count) for count in counts))


def values(series: StepSeries) -> dict[str, float]:
    return {
        "/".join(
            [sample.name.removeprefix("serve_app_engine_"), *filter(None, [sample.labels.get("phase")])]
        ): sample.value
        for family in series.families()
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


@pytest.mark.parametrize(("counts", "phase"), [((8, 3), "prefill"), ((1, 1, 1), "decode"), ((1, 1, 6), "mixed")])
def test_a_step_is_counted_by_what_its_sequences_did(counts: tuple[int, ...], phase: str) -> None:
    series = StepSeries("m", "r")
    series.saw(step(*counts), 0.25)
    found = values(series)
    assert (found["batch_size_count"], found["batch_size_sum"]) == (1, len(counts))
    assert (found["batch_tokens_count"], found["batch_tokens_sum"]) == (1, sum(counts))
    others = {"prefill", "decode", "mixed"} - {phase}
    assert (found[f"step_seconds_count/{phase}"], found[f"step_seconds_sum/{phase}"]) == (1, 0.25)
    assert [found[f"step_seconds_count/{other}"] for other in others] == [0, 0]
