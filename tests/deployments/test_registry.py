"""The registry keeps the latest report of every process, for as long as reports keep coming."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import Autoscaling, Deployment, Model
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
def registry(clock: Clock) -> ReplicaRegistry:
    return ReplicaRegistry(clock)


def metrics(replica: str) -> MetricsSnapshot:
    return MetricsSnapshot(b"counters of " + replica.encode(), b"gauges of " + replica.encode())


def parts(registry: ReplicaRegistry) -> set[bytes]:
    return set(registry.measurements().parts)


EMPTY = MetricsSnapshot(b"", b"")
COUNTERS, GAUGES = b"counters of r1", b"gauges of r1"
MODEL = Model(
    name="m", source="x", deployment=Deployment(max_ongoing_requests=32, max_queued_requests=1, num_replicas=1)
)
SCALED_TO_ZERO = MODEL.model_copy(
    update={
        "deployment": Deployment(
            max_ongoing_requests=32, max_queued_requests=1, autoscaling=Autoscaling(min_replicas=0)
        )
    }
)


def state(registry: ReplicaRegistry, model: Model = MODEL, routed: set[str] | None = None) -> tuple[str, str] | None:
    status = registry.snapshot().status(model, routed)
    return None if status is None else (status.state.value, status.detail)


def test_a_live_process_has_all_its_metrics(registry: ReplicaRegistry, clock: Clock) -> None:
    registry.take(Heartbeat("r1", "m", ""), metrics("r1"))
    clock.now += 4
    assert parts(registry) == {COUNTERS, GAUGES}
    assert registry.measurements().ages == [("m", "r1", 4.0)]
    assert registry.snapshot().ready("m") == 1


def test_the_counters_of_a_lost_process_are_exported_for_two_more_scrapes(
    registry: ReplicaRegistry, clock: Clock
) -> None:
    registry.take(Heartbeat("r1", "m", ""), metrics("r1"))
    clock.now += 6
    assert parts(registry) == {COUNTERS}
    assert registry.measurements().ages == []
    assert registry.snapshot().ready("m") == 0
    clock.now += 28.9
    assert parts(registry) == {COUNTERS}
    clock.now += 0.2
    assert parts(registry) == set()


def test_the_gauges_of_a_process_that_shuts_down_disappear_at_once(registry: ReplicaRegistry) -> None:
    registry.take(Heartbeat("r1", "m", ""), metrics("r1"))
    registry.take(Heartbeat("r1", "m", "", leaving=True), metrics("r1"))
    assert parts(registry) == {COUNTERS}
    assert registry.snapshot().ready("m") == 0


@pytest.mark.parametrize("last", [{"leaving": True}, {"failed": True}])
def test_a_late_report_of_a_replica_that_has_ended_is_ignored(
    registry: ReplicaRegistry, clock: Clock, last: dict[str, Any]
) -> None:
    registry.take(Heartbeat("r1", "m", ""), metrics("r1"))
    registry.take(Heartbeat("r1", "m", "", **last), metrics("r1"))
    clock.now += 0.5
    registry.take(Heartbeat("r1", "m", ""), MetricsSnapshot(b"late", b"late"))
    assert registry.snapshot().ready("m") == 0
    assert parts(registry) == {COUNTERS}


def test_the_reason_of_a_failure_stays_when_the_replica_shuts_down(registry: ReplicaRegistry, clock: Clock) -> None:
    clock.now += 10
    registry.take(Heartbeat("r1", "m", "no such file", failed=True), EMPTY)
    registry.take(Heartbeat("r1", "m", "", leaving=True), EMPTY)
    assert state(registry) == ("failed", "no such file")
    clock.now += 61
    assert state(registry) == ("loading", "no replica is running; Ray is starting one")


def test_the_status_of_a_second_attempt_has_the_reason_of_the_first_failure(registry: ReplicaRegistry) -> None:
    registry.take(Heartbeat("r1", "m", "no such file", failed=True), EMPTY)
    registry.take(Heartbeat("r2", "m", "loading weights"), EMPTY)
    assert state(registry) == ("loading", "no such file (Ray tries again: loading weights)")
    registry.take(Heartbeat("r2", "m", ""), EMPTY)
    assert state(registry) == ("ready", "")


def test_the_reports_of_several_processes_are_kept_separately(registry: ReplicaRegistry) -> None:
    registry.take(Heartbeat("r1", "", ""), metrics("r1"))
    registry.take(Heartbeat("r2", "m", "loading"), metrics("r2"))
    registry.take(Heartbeat("r3", "m", ""), EMPTY)
    assert parts(registry) == {b"", COUNTERS, GAUGES, b"counters of r2", b"gauges of r2"}
    assert (registry.snapshot().ready("m"), registry.snapshot().ingresses) == (1, 1)


def test_a_draining_replica_is_not_ready(registry: ReplicaRegistry) -> None:
    """Ray routes to other replicas only, while its heartbeats go on."""
    registry.take(Heartbeat("old", "m", ""), EMPTY)
    registry.take(Heartbeat("new", "m", ""), EMPTY)
    assert registry.snapshot().ready("m", {"new"}) == 1
    assert state(registry, routed=set()) == ("loading", "registering with Ray Serve")
    assert state(registry, routed={"new"}) == ("ready", "")


def test_a_model_that_scales_to_zero_is_asleep_while_its_last_replica_drains(
    registry: ReplicaRegistry, clock: Clock
) -> None:
    clock.now += 10
    registry.take(Heartbeat("old", "m", ""), EMPTY)
    found = state(registry, SCALED_TO_ZERO, routed=set())
    assert found is not None
    assert found[0] == ModelState.ASLEEP


def test_a_new_registry_does_not_know_a_models_state_before_every_process_could_report(
    registry: ReplicaRegistry, clock: Clock
) -> None:
    assert state(registry) is None
    clock.now += 5
    assert state(registry) == ("loading", "no replica is running; Ray is starting one")
    assert state(registry, SCALED_TO_ZERO) == ("asleep", "scaled to zero; the next request wakes it")


def test_a_routed_replica_is_ready_before_its_first_report(registry: ReplicaRegistry) -> None:
    """During a rollout the old replica drains already while the new one has not reported to this ingress."""
    registry.take(Heartbeat("old", "m", ""), EMPTY)
    assert state(registry, routed={"new"}) == ("ready", "")
    assert registry.snapshot().ready("m", {"new"}) == 1


def test_a_routed_replica_that_stopped_reporting_is_not_ready(registry: ReplicaRegistry, clock: Clock) -> None:
    registry.take(Heartbeat("r1", "m", ""), EMPTY)
    registry.take(Heartbeat("r2", "m", ""), EMPTY)
    clock.now += 4
    registry.take(Heartbeat("r2", "m", ""), EMPTY)
    clock.now += 3
    assert registry.snapshot().ready("m", {"r1", "r2"}) == 1
    registry.take(Heartbeat("r1", "m", ""), EMPTY)
    assert registry.snapshot().ready("m", {"r1", "r2"}) == 2, "it only stood still for a while"
