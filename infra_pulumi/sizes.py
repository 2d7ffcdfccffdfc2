"""What of a machine is left for one pod that takes the node for itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from infra_pulumi.spec import ClusterSpec, Fault, GpuPool, SpecError

# Of the machine's memory that kubelet and system keep, by Google's "Plan node sizes": so much of each further part.
# EKS and AKS keep less of machines of this size.
_KEPT = ((4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06))
_REST = 0.02
_FIRMWARE = 0.04  # what a hypervisor's 16 GiB lack when the kernel counts them
_DAEMONS_GIB = 1.0  # device plugin, exporters, network agents


@dataclass(frozen=True, slots=True)
class Machine:
    """As the catalogue has it; `gpu` is the card's name, None without one. Memory in GiB."""

    type: str
    vcpu: int
    memory_gib: float
    gpu: str | None = None
    gpu_count: int = 0


@dataclass(frozen=True, slots=True)
class PodSize:
    """What a worker pod asks for: CPUs to be scheduled by, CPUs it may use, memory in GiB, whole GPUs."""

    cpus: int
    cpu_limit: int
    memory_gib: int
    gpus: int


@cache
def machines(provider: str) -> dict[str, Machine]:
    """The provider's machines in the catalogue, by type."""
    rows: list[dict[str, Any]] = yaml.safe_load(
        resources.files("infra_pulumi").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    )["instance_types"]
    return {
        row["type"]: Machine(row["type"], row["vcpu"], row["memory_gib"], row.get("gpu"), row.get("gpu_count", 0))
        for row in rows
        if row["provider"] == provider
    }


def allocatable_gib(memory_gib: float) -> float:
    """What pods can have of a node's memory, in GiB."""
    left = memory_gib * (1 - _FIRMWARE)
    kept = 0.1  # kubelet evicts pods before the last 100 MiB
    for width, share in _KEPT:
        part = min(left, width)
        kept += part * share
        left -= part
    return memory_gib * (1 - _FIRMWARE) - kept - left * _REST - _DAEMONS_GIB


def machine(spec: ClusterSpec, instance_type: str, path: str) -> Machine:
    """Raises SpecError when the catalogue does not have it: `path` is where the description names it."""
    known = machines(spec.provider)
    if instance_type not in known:
        cards = ", ".join(sorted(each.type for each in known.values() if each.gpu))
        raise SpecError([Fault(path, f"{instance_type} is not in the catalogue, so its size is unknown; it has {cards}")])
    return known[instance_type]


def pool_machines(spec: ClusterSpec, index: int) -> tuple[Machine, ...]:
    """The machines of the spec's GPU pool number `index`, its alternatives in their order. Raises SpecError."""
    faults: list[Fault] = []
    found: list[Machine] = []
    for number, name in enumerate(spec.gpu_pools[index].instance_types):
        path = f"gpu_pools.{index}.instance_types.{number}"
        try:
            each = machine(spec, name, path)
        except SpecError as error:
            faults += error.faults
            continue
        if each.gpu_count == 0:
            faults.append(Fault(path, f"{name} has no GPU; name one that has"))
        found.append(each)
    if faults:
        raise SpecError(faults)
    return tuple(found)


def pod_size(spec: ClusterSpec, index: int) -> PodSize:
    """What one worker pod can have on any of the pool's machines. Raises SpecError."""
    choices = pool_machines(spec, index)
    vcpu = min(each.vcpu for each in choices)
    return PodSize(
        cpus=vcpu - 1,
        cpu_limit=vcpu,
        memory_gib=int(allocatable_gib(min(each.memory_gib for each in choices))),
        gpus=min(each.gpu_count for each in choices),
    )


def gpus(spec: ClusterSpec) -> int:
    """As many GPUs as the pools can have together."""
    return sum(pool.max * pod_size(spec, index).gpus for index, pool in enumerate(spec.gpu_pools))


def card(spec: ClusterSpec, pool: GpuPool) -> str:
    """The name of the pool's GPU, such as A10G. Raises SpecError."""
    return pool_machines(spec, spec.gpu_pools.index(pool))[0].gpu or ""
