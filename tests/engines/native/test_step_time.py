from __future__ import annotations

import pytest

from serve_app.engines.native.step_time import MAX_SLOWDOWN, StepTimeModel


def model_of(*steps: tuple[int, float]) -> StepTimeModel:
    """A model that recorded these rows and seconds."""
    model = StepTimeModel()
    for rows, seconds in steps:
        model.record(rows, seconds)
    return model


def test_a_model_without_records_predicts_nothing() -> None:
    assert StepTimeModel().predict(1) is None
    assert StepTimeModel().max_rows(1) is None


def test_times_between_recorded_groups_are_interpolated() -> None:
    model = model_of((8, 0.010), (108, 0.110))
    assert [model.predict(rows) for rows in (1, 8, 58, 108, 500)] == pytest.approx([0.01, 0.01, 0.06, 0.11, 0.11])


def test_the_newest_steps_weigh_most() -> None:
    model = model_of(*[(8, 0.01)] * 5, *[(8, 0.02)] * 20)
    assert model.predict(8) == pytest.approx(0.02, rel=0.02)


def test_a_step_may_take_its_usual_time_multiplied_by_the_slowdown() -> None:
    model = model_of((8, 0.010), (108, 0.110))
    assert model.max_rows(8) == pytest.approx(8 + 100 * 0.010 * (MAX_SLOWDOWN - 1) / 0.1, abs=1)


def test_larger_steps_are_tried_by_doubling() -> None:
    model = model_of((8, 0.010))
    assert model.max_rows(8) == 16
    model.record(16, 0.011)
    assert model.max_rows(8) == 32
    model.record(32, 0.030)
    assert 16 < (model.max_rows(8) or 0) < 32


@pytest.mark.parametrize("usual", [1, 8, 32])
def test_the_slowdown_stays_in_its_bound_where_every_row_costs_the_same(usual: int) -> None:
    def cost(rows: int) -> float:
        return 0.007 + 0.0003 * rows

    model = model_of(*[(1 << n, cost(1 << n)) for n in range(9)])
    rows = model.max_rows(usual)
    assert rows is not None
    assert usual < rows
    assert cost(rows) <= 1.05 * MAX_SLOWDOWN * cost(usual)


def test_the_limit_of_a_step_follows_the_expected_time() -> None:
    times = StepTimeModel()
    assert times.limit(4, 10) == 60, "the first step"
    times.record(4, 0.1)
    assert times.limit(4, 10) == 10
    times.record(64, 4.0)
    assert times.limit(4, 10) == 20, "a step of fewer rows may take as long as any step before"
    assert times.limit(64, 10) == 20
    assert times.limit(256, 10) == 80
    assert times.limit(1024, 10) == 320
    assert times.limit(100_000, 10) == 600
    assert times.limit(0, 10) == 10, "no forward pass runs"
