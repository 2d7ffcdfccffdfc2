"""Computes the cloud quotas that a description needs at its maximum size, by quota name.

A new account has no quota for most GPUs; without a quota, the cloud creates no nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from infra_pulumi.catalogue import Catalogue, InstanceType
from infra_pulumi.spec import ClusterSpec

# By the first letters of the type and by spot; unit vCPUs.
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-quotas.html
_AWS = {
    ("g", False): ("Running On-Demand G and VT instances", "L-DB2E81BA"),
    ("g", True): ("All G and VT Spot Instance Requests", "L-3819A6DF"),
    ("p", False): ("Running On-Demand P instances", "L-417A185B"),
    ("p", True): ("All P4, P3 and P2 Spot Instance Requests", "L-7212CCBC"),
    ("p5", True): ("All P5 Spot Instance Requests", "L-C4BD4855"),
}
# By the suffix of the type; spot machines of all families share one quota. Unit vCPUs.
# https://learn.microsoft.com/azure/virtual-machines/quotas
_AZURE = {
    "_T4_v3": "StandardNCASv3_T4Family",
    "_A100_v4": "StandardNCADSA100v4Family",
    "_H100_v5": "StandardNCadsH100v5Family",
}
_AZURE_SPOT = "lowPriorityCores"


@dataclass(frozen=True, slots=True)
class Need:
    """One required quota. `command` prints its current limit."""

    quota: str
    amount: int
    unit: str
    command: str


def needs(spec: ClusterSpec, catalogue: Catalogue) -> Iterator[Need]:
    """The quotas of all GPU pools at their maximum size. Machines with an unknown quota are left out."""
    amounts: Counter[str] = Counter()
    commands: dict[str, str] = {}
    unit = "GPUs" if spec.provider == "gcp" else "vCPUs"
    for group in spec.node_groups():
        machines = [catalogue.get(spec.provider, name) for name in group.pool.instance_types]
        each = max((each.gpu_count if unit == "GPUs" else each.vcpu) for each in machines)
        # The types of a pool have the same GPUs, and therefore the same quota unless families are mixed.
        for quota, command in _quotas(machines[0], group.spot, spec.region):
            amounts[quota] += group.max * each
            commands[quota] = command
    for quota, amount in amounts.items():
        if amount:
            yield Need(quota, amount, unit, commands[quota])


def warnings(spec: ClusterSpec, catalogue: Catalogue) -> Iterator[str]:
    """A sentence for each required quota."""
    for need in needs(spec, catalogue):
        yield (
            f"The cluster needs up to {need.amount} {need.unit} of the quota {need.quota}; "
            f"a new account has few or none: {need.command}"
        )


def _quotas(machine: InstanceType, spot: bool, region: str) -> Iterator[tuple[str, str]]:
    """Quota names with the commands that print them."""
    match machine.provider:
        case "aws":
            family = "p5" if spot and machine.type.startswith("p5") else machine.type[0]
            if (family, spot) in _AWS:
                name, code = _AWS[family, spot]
                show = f"aws service-quotas get-service-quota --service-code ec2 --quota-code {code} --region {region}"
                yield f"{name!r} ({code})", show
        case "gcp":
            regional = f"gcloud compute regions describe {region}"
            yield f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{_gcp_name(machine)}_GPUS", f"{regional} {_GCP_TABLE}"
            yield "GPUS_ALL_REGIONS", f"gcloud compute project-info describe {_GCP_TABLE}"
        case _:
            family = next((family for end, family in _AZURE.items() if machine.type.endswith(end)), "")
            if spot or family:
                yield _AZURE_SPOT if spot else family, f"az vm list-usage --location {region} --output table"


_GCP_TABLE = '--flatten=quotas --format="table(quotas.metric,quotas.limit,quotas.usage)"'


def _gcp_name(machine: InstanceType) -> str:
    name = re.sub(r"[^A-Z0-9]+", "_", str(machine.gpu).upper())
    return f"{name}_80GB" if name == "A100" and machine.gpu_memory_gib == 80 else name
