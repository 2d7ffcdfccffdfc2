"""What of a machine is left for one pod that takes the node for itself."""

from __future__ import annotations

from dataclasses import dataclass

from infra_pulumi.catalogue import Catalogue, InstanceType
from infra_pulumi.spec import ClusterSpec

# Of the machine's memory that kubelet and system keep, by Google's "Plan node sizes": so much of each further part.
# EKS and AKS (with 110 pods a node) keep less.
_KEPT = ((4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06))
_REST = 0.02
_EVICTION_GIB = 0.1  # kubelet evicts pods before the last 100 MiB
_FIRMWARE = 0.04  # what a hypervisor's 16 GiB lack when the kernel counts them
_DAEMONS_GIB = 1.0  # device plugin, exporters, network agents


@dataclass(frozen=True, slots=True)
class PodSize:
    """What a worker pod asks for: CPUs to be scheduled by, CPUs it may use, memory in GiB, whole GPUs."""

    cpus: int
    cpu_limit: int
    memory_gib: int
    gpus: int


def allocatable_gib(memory_gib: float) -> float:
    """What a pod can have of a node's memory, in GiB."""
    seen = left = memory_gib * (1 - _FIRMWARE)
    kept = _EVICTION_GIB
    for width, share in _KEPT:
        part = min(left, width)
        kept += part * share
        left -= part
    return seen - kept - left * _REST - _DAEMONS_GIB


def machines(spec: ClusterSpec, catalogue: Catalogue, index: int) -> tuple[InstanceType, ...]:
    """Those of the spec's GPU pool number `index`, in their order. Raises CatalogueError: `catalogue.check` first."""
    return tuple(catalogue.get(spec.provider, name) for name in spec.gpu_pools[index].instance_types)


def pod_size(spec: ClusterSpec, catalogue: Catalogue, index: int) -> PodSize:
    """What one worker pod can have on any of the pool's machines. Raises CatalogueError."""
    choices = machines(spec, catalogue, index)
    vcpu = min(each.vcpu for each in choices)
    return PodSize(
        cpus=vcpu - 1,
        cpu_limit=vcpu,
        memory_gib=int(allocatable_gib(min(each.memory_gib for each in choices))),
        gpus=min(each.gpu_count for each in choices),
    )


def gpus(spec: ClusterSpec, catalogue: Catalogue) -> int:
    """As many GPUs as the pools can have together. Raises CatalogueError."""
    return sum(pool.max * pod_size(spec, catalogue, index).gpus for index, pool in enumerate(spec.gpu_pools))
