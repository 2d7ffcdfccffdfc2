from __future__ import annotations

import pytest

from serve_app.engines.native.step_time import STRETCH, StepTimeModel


def taught(*steps: tuple[int, float]) -> StepTimeModel:
    pace = StepTimeModel()
    for rows, seconds in steps:
        pace.record(rows, seconds)
    return pace


def test_nothing_is_known_at_first() -> None:
    assert StepTimeModel().seconds(1) is None
    assert StepTimeModel().most_rows(1) is None


def test_between_what_is_known_it_is_in_proportion() -> None:
    pace = taught((8, 0.010), (108, 0.110))
    assert [pace.seconds(rows) for rows in (1, 8, 58, 108, 500)] == pytest.approx([0.01, 0.01, 0.06, 0.11, 0.11])


def test_the_newest_counts_most() -> None:
    pace = taught(*[(8, 0.01)] * 5, *[(8, 0.02)] * 20)
    assert pace.seconds(8) == pytest.approx(0.02, rel=0.02)


def test_a_step_may_take_its_usual_time_and_a_part_more() -> None:
    pace = taught((8, 0.010), (108, 0.110))
    assert pace.most_rows(8) == pytest.approx(8 + 100 * 0.010 * (STRETCH - 1) / 0.1, abs=1)


def test_what_was_never_tried_is_tried_by_doubling() -> None:
    pace = taught((8, 0.010))
    assert pace.most_rows(8) == 16
    pace.record(16, 0.011)
    assert pace.most_rows(8) == 32
    pace.record(32, 0.030)
    assert 16 < (pace.most_rows(8) or 0) < 32


@pytest.mark.parametrize("usual", [1, 8, 32])
def test_the_promise_holds_where_a_row_costs_the_same(usual: int) -> None:
    def cost(rows: int) -> float:
        return 0.007 + 0.0003 * rows

    pace = taught(*[(1 << n, cost(1 << n)) for n in range(9)])
    rows = pace.most_rows(usual)
    assert rows is not None
    assert usual < rows
    assert cost(rows) <= 1.05 * STRETCH * cost(usual)
