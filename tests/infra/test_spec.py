"""The cluster description: defaults, and the faults of invalid descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra_pulumi.spec import ClusterSpec, SpecError, load, parse
from tests.infra.helpers import document


def faults(invalid: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse(invalid)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("provider", "region", "zones", "system"),
    [
        ("aws", "us-west-2", ("us-west-2a", "us-west-2b"), "m7i.2xlarge"),
        ("gcp", "us-central1", ("us-central1-a", "us-central1-b", "us-central1-c"), "n2-standard-8"),
        ("azure", "eastus", ("1", "2", "3"), "Standard_D8s_v5"),
    ],
)
def test_a_provider_and_a_machine_are_sufficient(
    provider: str, region: str, zones: tuple[str, ...], system: str
) -> None:
    spec = parse(document(provider))
    assert (spec.region, spec.zones, spec.system.instance_type) == (region, zones, system)
    assert spec.gpu_pools[0].min == 0


def test_a_description_is_immutable() -> None:
    spec = parse(document())
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]


def test_on_demand_base_makes_a_separate_node_group() -> None:
    spec = parse(document(pool={"spot": True, "on_demand_base": 2, "min": 3, "max": 10}))
    assert [(group.name, group.spot, group.min, group.max) for group in spec.node_groups()] == [
        ("gpuod", False, 2, 2),
        ("gpusp", True, 1, 8),
    ]


def test_reserved_tags_come_first() -> None:
    assert parse(document(tags={"team": "search"})).all_tags() == {
        "app": "serve-app",
        "cluster": "serve-app",
        "managed-by": "pulumi",
        "team": "search",
    }


def test_every_fault_is_listed_with_its_path() -> None:
    invalid = document(
        "gcp",
        zones=["us-west1-a"],
        kubernetes_version=1.35,
        network={"cidr": "8.8.8.0/16", "api_cidrs": ["0.0.0.0/0"]},
        gpu_pools=[
            {"instance_types": ["g5.xlarge"], "min": 5, "on_demand_base": 1, "colour": "red"},
            {"instance_types": ["g2-standard-4"], "name": "B"},
        ],
        serve={"image": "registry.example.org/x:latest"},
        budget={"monthly_usd": 10, "emails": ["nobody"]},
        production=True,
    )
    assert [fault.partition(":")[0] for fault in faults(invalid)] == [
        "zones.0",
        "kubernetes_version",
        "network.cidr",
        "network.api_cidrs.0",
        "gpu_pools.0.max",
        "gpu_pools.0.on_demand_base",
        "gpu_pools.0.colour",
        "gpu_pools.1.name",
        "serve.image",
        "budget.emails.0",
        "production",
        "gpu_pools.0.instance_types.0",
    ]


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"gpu_pools": []}, "provider: missing"),
        (document(region="Oregon"), "region: 'Oregon' is not a region of aws; write it like us-west-2"),
        (document(zones=["us-west-2a"]), "zones: EKS needs subnets in at least two zones; list two"),
        (document(zones=["us-west-2a", "us-west-2a"]), "zones: a zone is listed twice; list each once"),
        (document(kubernetes_version="1.29"), "kubernetes_version: 1.29 is too old; take 1.35 (minimum 1.34)"),
        (document(kubernetes_version="latest"), "write it like '1.35', in quotes"),
        (
            document(network={"cidr": "10.40.0.0/24"}),
            "network.cidr: 10.40.0.0/24 is a /24; take a range from /16 to /20",
        ),
        (document(network={"cidr": "10.40.0.1/16"}), "has host bits set; write an IPv4 range such as 10.40.0.0/16"),
        (document(network={"cidr": "100.64.0.0/16"}), "pods_cidr: 100.64.0.0/14 overlaps cidr 100.64.0.0/16"),
        (document(system={"min": 5}), "system.max: 4 is below min 5; raise max or lower min"),
        (document(system={"instance_type": "big"}), "system.instance_type: 'big' is not an instance type of aws"),
        (document(pool={"min": 9}), "gpu_pools.0.max: 4 is below min 9; raise max or lower min"),
        (document(pool={"max": 101}), "gpu_pools.0.max: Input should be less than or equal to 100"),
        (document(pool={"on_demand_base": 1}), "set spot: true, or remove on_demand_base"),
        (document(pool={"spot": True, "on_demand_base": 1}), "1 on-demand nodes exceed min 0; raise min to 1"),
        (
            document(pool={"spot": True, "min": 4, "on_demand_base": 4}),
            "4 on-demand nodes of max 4 leave none for spot",
        ),
        (document(pool={"instance_types": ["g5.xlarge"] * 2}), "g5.xlarge is listed twice; list each type once"),
        (document(pool={"labels": {"serve-app/pool": "x"}}), "serve-app/pool is reserved for the cluster"),
        (document(pool={"labels": {"node.kubernetes.io/x": "x"}}), "is reserved for the cluster; choose another key"),
        (document(pool={"taints": [{"key": "nvidia.com/gpu"}]}), "a duplicate is an error; remove it"),
        (
            document(pool={"zones": ["us-west-2c"]}),
            "us-west-2c are not zones of the cluster, which has us-west-2a, us-west-2b",
        ),
        (document("gcp", pool={"instance_types": ["g2-standard-4", "g2-standard-8"]}), "define a pool for each type"),
        (
            document(gpu_pools=[{"instance_types": ["g5.xlarge"]}] * 2),
            "two node groups would have the name gpu; rename a pool",
        ),
        (document(pool={"name": "system"}), "the name system is reserved for the CPU pool; rename this pool"),
        (
            document(
                gpu_pools=[
                    {"instance_types": ["g5.xlarge"], "spot": True, "min": 1, "on_demand_base": 1},
                    {"instance_types": ["g5.xlarge"], "name": "gpuod"},
                ]
            ),
            "two node groups would have the name gpuod",
        ),
        (document(network={"services_cidr": "100.68.0.0/20"}), "EKS does not accept 100.68.0.0/20 for services"),
        (
            document("gcp", budget={"monthly_usd": 5, "emails": [f"a{n}@host.org" for n in range(6)]}),
            "budget.emails: Google notifies at most 5 addresses, not 6",
        ),
        (
            document(administrators=["me"]),
            "administrators.0: 'me' is not a principal of aws; write it like arn:aws:iam::",
        ),
        (document("gcp", administrators=["group:a@b.org"] * 2), "administrators: group:a@b.org is listed twice"),
        (
            document(tags={"cluster": "mine"}),
            "tags: cluster is reserved: every resource has it, and budgets filter by it",
        ),
        (
            document(budget={"monthly_usd": 5, "thresholds": [80, 50]}),
            "are not increasing; write them like [50, 80, 100]",
        ),
        (document(tags={"Team": "x"}), "tags.Team.[key]: 'Team' does not match"),
        (document(colour="red"), "colour: unknown key; known keys: provider, name, region"),
    ],
)
def test_an_invalid_value_is_refused_with_a_message(invalid: dict[str, Any], message: str) -> None:
    assert message in "\n".join(faults(invalid))


@pytest.mark.parametrize("invalid", [None, [], "aws", 3])
def test_a_description_must_be_a_mapping(invalid: Any) -> None:
    assert faults(invalid) == ["(top): not a mapping; a description begins like `provider: aws`"]


def test_a_file_is_read_and_validated(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    with pytest.raises(SpecError, match="no such file"):
        load(path)
    path.write_text("provider: [")
    with pytest.raises(SpecError, match=r"cluster\.yaml is invalid"):
        load(path)
    path.write_text("provider: aws\ngpu_pools: [{instance_types: [g5.xlarge]}]\n")
    assert load(path) == parse(document())


def test_a_description_survives_a_json_round_trip() -> None:
    spec = parse(document("azure", budget={"monthly_usd": 500, "emails": ["ops@host.org"]}, tags={"team": "a"}))
    assert ClusterSpec.model_validate_json(spec.model_dump_json()) == spec
