"""What a model's deployment asks Ray to reserve: resources of one node, or a placement group on several."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import AppConfig
from tests.configs import app_args

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),  # by Ray
]


def replica_config(**model: Any) -> Any:
    """Ray's options of the replicas of a model, which Ray has checked: the replica fits into the first bundle."""
    from serve_app.app import build

    application = build(AppConfig.model_validate(app_args(**model)))
    (of_model,) = application._bound_deployment.init_args[1]
    return of_model._bound_deployment._replica_config


def vllm(tensor: int, pipeline: int = 1) -> dict[str, Any]:
    return {"kind": "vllm", "tensor_parallel": tensor, "pipeline_parallel": pipeline}


@pytest.mark.parametrize(
    ("engine", "num_gpus"),
    [({}, 0), ({}, 0.5), ({"kind": "auto"}, 2), (vllm(1), 0), (vllm(1), 0.5), (vllm(1), 1), (vllm(2, 2), 4)],
)
def test_a_replica_on_one_node_reserves_its_gpus_itself(engine: dict[str, Any], num_gpus: float) -> None:
    resources = {"num_cpus": 2, "num_gpus": num_gpus, "accelerator_type": "L4"}
    config = replica_config(source="a/b", engine=engine, resources=resources)
    assert config.ray_actor_options == resources
    assert config.placement_group_bundles is None


def test_a_replica_on_several_nodes_reserves_one_bundle_for_each_gpu() -> None:
    config = replica_config(source="a/b", engine=vllm(4, 2), resources={"num_cpus": 2, "num_gpus": 4})
    assert config.placement_group_bundles == [{"CPU": 2, "GPU": 1}, *[{"GPU": 1}] * 7]
    assert config.placement_group_strategy == "PACK"
    assert config.ray_actor_options == {"num_cpus": 2, "num_gpus": 0}, "the first bundle has the replica's CPUs"


def test_every_bundle_is_on_a_gpu_of_the_type() -> None:
    resources = {"num_cpus": 0, "num_gpus": 1, "accelerator_type": "H100"}
    config = replica_config(source="a/b", engine=vllm(2), resources=resources)
    assert config.placement_group_bundles == [{"GPU": 1, "accelerator_type:H100": 0.001}] * 2
    assert config.ray_actor_options == {"num_cpus": 0, "num_gpus": 0}
