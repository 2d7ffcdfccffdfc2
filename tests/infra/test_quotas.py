"""Cloud quotas that a description needs, compared with values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infra_pulumi import catalogue, quotas
from infra_pulumi.spec import parse
from tests.infra.helpers import document


@pytest.mark.parametrize(
    ("provider", "pool", "expected"),
    [
        ("aws", {"max": 3}, [("'Running On-Demand G and VT instances' (L-DB2E81BA)", 12, "vCPUs")]),
        (
            "aws",
            {"max": 5, "spot": True, "min": 1, "on_demand_base": 1},
            [
                ("'Running On-Demand G and VT instances' (L-DB2E81BA)", 4, "vCPUs"),
                ("'All G and VT Spot Instance Requests' (L-3819A6DF)", 16, "vCPUs"),
            ],
        ),
        (
            "aws",
            {"instance_types": ["p5.48xlarge"], "max": 2, "spot": True},
            [("'All P5 Spot Instance Requests' (L-C4BD4855)", 384, "vCPUs")],
        ),
        (
            "aws",
            {"instance_types": ["p4d.24xlarge"], "max": 1, "spot": True},
            [("'All P4, P3 and P2 Spot Instance Requests' (L-7212CCBC)", 96, "vCPUs")],
        ),
        ("gcp", {"max": 3}, [("NVIDIA_L4_GPUS", 3, "GPUs"), ("GPUS_ALL_REGIONS", 3, "GPUs")]),
        (
            "gcp",
            {"instance_types": ["a2-ultragpu-1g"], "max": 2, "spot": True},
            [("PREEMPTIBLE_NVIDIA_A100_80GB_GPUS", 2, "GPUs"), ("GPUS_ALL_REGIONS", 2, "GPUs")],
        ),
        (
            "gcp",
            {"instance_types": ["a2-highgpu-2g"], "max": 2},
            [("NVIDIA_A100_GPUS", 4, "GPUs"), ("GPUS_ALL_REGIONS", 4, "GPUs")],
        ),
        ("azure", {"max": 2}, [("StandardNCADSA100v4Family", 48, "vCPUs")]),
        (
            "azure",
            {"instance_types": ["Standard_NC8as_T4_v3"], "max": 2},
            [("StandardNCASv3_T4Family", 16, "vCPUs")],
        ),
        ("azure", {"max": 2, "spot": True}, [("lowPriorityCores", 48, "vCPUs")]),
    ],
)
def test_quotas_equal_hand_computed_values(
    provider: str, pool: dict[str, Any], expected: list[tuple[str, int, str]]
) -> None:
    found = quotas.needs(parse(document(provider, pool=pool)), catalogue.load())
    assert [(need.quota, need.amount, need.unit) for need in found] == expected


GPUS = [each for each in catalogue.load().instance_types if each.gpu]


@pytest.mark.parametrize("machine", GPUS, ids=lambda machine: machine.name)
def test_every_gpu_machine_has_a_quota(machine: catalogue.InstanceType) -> None:
    pool = {"instance_types": [machine.type], "max": 1}
    for spot in (False, True):
        spec = parse(document(machine.provider, pool={**pool, "spot": spot}))
        (first, *_) = quotas.warnings(spec, catalogue.load())
        assert spec.region in first
