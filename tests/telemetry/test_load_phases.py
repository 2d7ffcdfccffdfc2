"""The phases of loading a model."""

from __future__ import annotations

from serve_app.telemetry.load_phases import LoadPhases


def test_a_phase_is_the_sum_of_its_stages_and_nothing_follows_the_end() -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 100.0])
    phases = LoadPhases(lambda: next(times))
    for stage in ("importing torch", "loading weights", "converting the model file: 3%", "loading more", "", "late"):
        phases.begin(stage)
    assert phases.seconds == {"starting": 1, "importing": 2, "loading": 3 + 5, "converting": 4}
