"""What the service gives to Ray Serve's autoscaler. Decisions on a real cluster: tests/graph/test_autoscaling.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import Autoscaling, Deployment, Model
from serve_app.core.scaling import Demand, ReplicaSpeed

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),  # by Ray
]

# Runs what the controller of Ray Serve runs, in a process that cannot import the service.
ELSEWHERE = """
import sys
sys.modules["serve_app"] = None
from pathlib import Path
from ray import cloudpickle
policy = cloudpickle.loads(Path(sys.argv[1]).read_bytes())("m", 2.0, 8, 0, 60.0)
class Context:
    app_name, target_num_replicas, policy_state = "app", 3, {}
print(policy(Context()))
"""


def model(**scaling: object) -> Model:
    deployment = Deployment(
        max_ongoing_requests=64, max_queued_requests=1, autoscaling=Autoscaling.model_validate(scaling)
    )
    return Model(name="m", source="builtin:toy", deployment=deployment)


def options_of(one: Model) -> dict[str, Any]:
    from serve_app.deployments.autoscaling import model_autoscaling

    assert one.deployment.autoscaling is not None
    return model_autoscaling(one, one.deployment.autoscaling)


def test_the_work_decides_unless_a_number_of_requests_is_set() -> None:
    by_work = model(min_replicas=0, max_replicas=4, target_ttft_s=3)
    options = options_of(by_work)
    kwargs = {"model": "m", "target_ttft_s": 3, "slots": 32, "min_idle": 0, "span_s": 60}
    assert options["policy"].policy_kwargs == kwargs, "32 sequences run, although 64 requests may be at a replica"
    by_requests = model(max_replicas=4, target_ongoing_requests=8)
    assert "policy" not in options_of(by_requests)
    assert options_of(by_requests)["target_ongoing_requests"] == 8


def test_the_replicas_that_are_kept_ready_start_with_the_service() -> None:
    one = model(min_replicas=0, max_replicas=4, min_idle=2)
    assert options_of(one)["min_replicas"] == 2


def test_an_ingress_is_scaled_by_requests() -> None:
    from serve_app.deployments.autoscaling import ray_autoscaling

    assert ray_autoscaling(Autoscaling(max_replicas=2))["target_ongoing_requests"] == 32


def test_the_controller_needs_no_installed_service(tmp_path: Path) -> None:
    """Without a connection to Ray the policy cannot read its reports, and keeps the number of replicas."""
    one = model(max_replicas=2)
    policy = options_of(one)["policy"]
    (tmp_path / "policy").write_bytes(policy.get_serialized_policy_def())
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "policy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "(3, {})", done.stderr
    assert "the number of replicas of m is not changed" in done.stderr


def test_the_reports_of_all_ingresses_are_summed() -> None:
    """Every ingress knows the same replicas, and its own requests."""
    from serve_app.deployments.autoscaling import summed
    from serve_app.deployments.work_reports import WorkReport

    speed = ReplicaSpeed(100, 10)
    reports = [
        WorkReport(Demand(1, 2, 3.0, 4.0, 5.0, 6.0), {"r1": speed}),
        WorkReport(Demand(1, 1, 1.0, 1.0, 1.0, 1.0), {"r1": speed, "r2": speed}),
    ]
    assert summed(reports) == (Demand(2, 3, 4.0, 5.0, 6.0, 7.0), {"r1": speed, "r2": speed})
    assert summed([]) == (Demand(), {})


@pytest.mark.parametrize(
    ("worth", "stopped"), [({}, "new"), ({"old": 5.0, "middle": 1.0, "new": 9.0}, "middle"), ({"new": 1.0}, "middle")]
)
def test_the_replica_whose_cache_has_saved_least_stops_first(worth: dict[str, float], stopped: str) -> None:
    """By Ray's own scheduler. Among replicas that have saved nothing, the newest one stops, as Ray does it."""
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.deployment_scheduler import DeploymentScheduler

    from serve_app.deployments.autoscaling import WorkPolicy

    WorkPolicy("m", 2.0, 8, 0, 60.0)
    name = DeploymentID("d", "app")

    class Nodes:
        def get_node_labels(self, node_id: str) -> dict[str, str]:
            return {}

    scheduler = DeploymentScheduler(Nodes(), "head", lambda *_: None)
    scheduler.on_deployment_created(name, None)
    for replica in ("old", "middle", "new"):
        scheduler.on_replica_running(ReplicaID(replica, name), "node")
    DeploymentScheduler._serve_app_cache_worth[name] = worth
    (chosen,) = scheduler._get_replicas_to_stop(name, 1)
    assert chosen.unique_id == stopped
