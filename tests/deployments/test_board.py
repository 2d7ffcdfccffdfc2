"""What the notice board keeps, and for how long."""

from __future__ import annotations

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from serve_app.config import Deployment, Model
from serve_app.deployments.board import Notice, Notices
from serve_app.types import ModelState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Notices:
    return Notices(clock)


def families(replica: str) -> list[Metric]:
    counter = CounterMetricFamily("serve_app_requests", "x", labels=["replica"])
    gauge = GaugeMetricFamily("serve_app_active_requests", "x", labels=["replica"])
    counter.add_metric([replica], 7)
    gauge.add_metric([replica], 1)
    return [counter, gauge]


def shown(board: Notices) -> set[tuple[str, str]]:
    measured = board.measured()
    return {(sample.name, sample.labels["replica"]) for family in measured.families for sample in family.samples}


MODEL = Model(
    name="m", source="x", deployment=Deployment(max_ongoing_requests=32, max_queued_requests=1, num_replicas=1)
)
COUNTED = ("serve_app_requests_total", "r1")
HELD = ("serve_app_active_requests", "r1")


def test_a_process_that_is_alive_is_shown_whole(board: Notices, clock: Clock) -> None:
    board.take(Notice("r1", "m", ""), families("r1"))
    clock.now += 4
    assert shown(board) == {COUNTED, HELD}
    assert board.measured().ages == [("m", "r1", 4.0)]
    assert board.board().ready("m") == 1


def test_of_one_that_is_gone_its_counts_are_shown_for_two_scrapes_more(board: Notices, clock: Clock) -> None:
    board.take(Notice("r1", "m", ""), families("r1"))
    clock.now += 6
    assert shown(board) == {COUNTED}
    assert board.measured().ages == []
    assert board.board().ready("m") == 0
    clock.now += 28.9
    assert shown(board) == {COUNTED}
    clock.now += 0.2
    assert shown(board) == set()


def test_one_that_says_goodbye_is_gone_at_once(board: Notices, clock: Clock) -> None:
    board.take(Notice("r1", "m", ""), families("r1"))
    board.take(Notice("r1", "m", "", leaving=True), families("r1"))
    assert shown(board) == {COUNTED}
    assert board.board().ready("m") == 0


def test_a_goodbye_does_not_take_a_failure_along(board: Notices, clock: Clock) -> None:
    clock.now += 10
    board.take(Notice("r1", "m", "no such file", failed=True), [])
    board.take(Notice("r1", "m", "", leaving=True), [])
    status = board.board().status(MODEL)
    assert status is not None
    assert (status.state, status.detail) == (ModelState.FAILED, "no such file")


def test_processes_are_told_apart(board: Notices, clock: Clock) -> None:
    board.take(Notice("r1", "", ""), families("r1"))
    board.take(Notice("r1", "m", ""), [])
    board.take(Notice("r2", "m", "loading"), families("r2"))
    assert {replica for _, replica in shown(board)} == {"r1", "r2"}
    assert board.board().ready("m") == 1
