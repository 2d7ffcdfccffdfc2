"""What the notice board keeps, and for how long."""

from __future__ import annotations

import pytest

from serve_app.config import Deployment, Model
from serve_app.core.queries import ModelState
from serve_app.deployments.registry import Heartbeat, ReplicaRegistry
from serve_app.telemetry.exposition import MetricsSnapshot


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> ReplicaRegistry:
    return ReplicaRegistry(clock)


def measured(replica: str) -> MetricsSnapshot:
    return MetricsSnapshot(b"counted by " + replica.encode(), b"held by " + replica.encode())


def shown(board: ReplicaRegistry) -> set[bytes]:
    return set(board.measured().parts)


MODEL = Model(
    name="m", source="x", deployment=Deployment(max_ongoing_requests=32, max_queued_requests=1, num_replicas=1)
)
COUNTED = b"counted by r1"
HELD = b"held by r1"


def test_a_process_that_is_alive_is_shown_whole(board: ReplicaRegistry, clock: Clock) -> None:
    board.take(Heartbeat("r1", "m", ""), measured("r1"))
    clock.now += 4
    assert shown(board) == {COUNTED, HELD}
    assert board.measured().ages == [("m", "r1", 4.0)]
    assert board.board().ready("m") == 1


def test_of_one_that_is_gone_its_counts_are_shown_for_two_scrapes_more(board: ReplicaRegistry, clock: Clock) -> None:
    board.take(Heartbeat("r1", "m", ""), measured("r1"))
    clock.now += 6
    assert shown(board) == {COUNTED}
    assert board.measured().ages == []
    assert board.board().ready("m") == 0
    clock.now += 28.9
    assert shown(board) == {COUNTED}
    clock.now += 0.2
    assert shown(board) == set()


def test_one_that_says_goodbye_is_gone_at_once(board: ReplicaRegistry, clock: Clock) -> None:
    board.take(Heartbeat("r1", "m", ""), measured("r1"))
    board.take(Heartbeat("r1", "m", "", leaving=True), measured("r1"))
    assert shown(board) == {COUNTED}
    assert board.board().ready("m") == 0


def test_a_goodbye_does_not_take_a_failure_along(board: ReplicaRegistry, clock: Clock) -> None:
    clock.now += 10
    board.take(Heartbeat("r1", "m", "no such file", failed=True), MetricsSnapshot(b"", b""))
    board.take(Heartbeat("r1", "m", "", leaving=True), MetricsSnapshot(b"", b""))
    status = board.board().status(MODEL)
    assert status is not None
    assert (status.state, status.detail) == (ModelState.FAILED, "no such file")


def test_processes_are_told_apart(board: ReplicaRegistry, clock: Clock) -> None:
    board.take(Heartbeat("r1", "", ""), measured("r1"))
    board.take(Heartbeat("r1", "m", ""), MetricsSnapshot(b"", b""))
    board.take(Heartbeat("r2", "m", "loading"), measured("r2"))
    assert shown(board) == {b"", COUNTED, HELD, b"counted by r2", b"held by r2"}
    assert board.board().ready("m") == 1
