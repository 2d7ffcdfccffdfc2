"""The metrics of experiments follow the configuration, and exist before the first request."""

from __future__ import annotations

from serve_app.core.experiments import SKIPPED, YIELDED
from serve_app.telemetry.experiment_metrics import ExperimentSeries
from serve_app.telemetry.metrics import OUTCOMES


def values(series: ExperimentSeries) -> dict[tuple[str, ...], float]:
    """The values without times, by name and labels other than the replica."""
    return {
        (sample.name.removeprefix("serve_app_"), *(v for k, v in sorted(sample.labels.items()) if k != "replica")):
        sample.value
        for family in series.families()
        for sample in family.samples
        if "le" not in sample.labels and not sample.name.endswith("_sum")
    }  # fmt: skip


def configured() -> ExperimentSeries:
    series = ExperimentSeries("r", ["m"])
    series.configure({"chat": ["control", "b"]})
    return series


def test_the_series_of_all_variants_exist_with_the_value_0() -> None:
    found = values(configured())
    for variant in ("control", "b"):
        for outcome in OUTCOMES:
            assert found["experiment_requests_total", "chat", outcome, variant] == 0
        for outcome in (*OUTCOMES, SKIPPED, YIELDED):
            assert found["experiment_shadow_requests_total", "chat", outcome, variant] == 0
    assert found["feedback_total", "", "m", "bad", ""] == found["feedback_total", "", "m", "good", ""] == 0
    assert set(found.values()) == {0}


def test_a_request_a_mirrored_one_and_feedback_are_counted() -> None:
    series = configured()
    series.request_ended("chat", "b", "stop", 0.2, 0.01, 7)
    series.request_ended("chat", "b", "internal_error", None, None, 0)
    series.shadow_ended("chat", "b", SKIPPED)
    series.feedback("m", "chat", "b", 0.5)
    series.feedback("m", "", "", 0.4)
    assert {key: value for key, value in values(series).items() if value} == {
        ("experiment_requests_total", "chat", "stop", "b"): 1,
        ("experiment_requests_total", "chat", "internal_error", "b"): 1,
        ("experiment_generated_tokens_total", "chat", "b"): 7,
        ("experiment_time_to_first_token_seconds_count", "chat", "b"): 1,
        ("experiment_time_per_output_token_seconds_count", "chat", "b"): 1,
        ("experiment_shadow_requests_total", "chat", SKIPPED, "b"): 1,
        ("feedback_total", "chat", "", "good", "b"): 1,
        ("feedback_total", "", "m", "bad", ""): 1,
    }


def test_the_state_of_an_experiment_and_of_the_configuration() -> None:
    series = configured()
    series.set_state("chat", {"control": 0.9, "b": 0.1}, stopped=True)
    series.set_refused(True)
    found = values(series)
    assert found["experiment_variant_share_ratio", "chat", "b"] == 0.1
    assert (found["experiment_stopped", "chat"], found["experiments_config_refused",]) == (1, 1)


def test_a_change_keeps_the_counts_of_what_stays_and_removes_the_rest() -> None:
    series = configured()
    series.request_ended("chat", "control", "stop", 0.2, 0.01, 7)
    series.configure({"chat": ["control", "c"], "other": ["control", "b"]})
    found = values(series)
    assert found["experiment_requests_total", "chat", "stop", "control"] == 1
    assert {key[-1] for key in found if key[:2] == ("experiment_requests_total", "chat")} == {"control", "c"}
    series.configure({})
    series.request_ended("chat", "control", "stop", 0.2, 0.01, 7)
    series.shadow_ended("chat", "control", SKIPPED)
    series.feedback("m", "chat", "control", 1.0)
    assert [key for key in values(series) if key[0].startswith("experiment_") or "chat" in key] == []
    assert values(series)["experiments_config_refused",] == 0
