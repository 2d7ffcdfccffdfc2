"""Computes the CPUs, memory and GPUs that one worker pod can use if it has a node for itself."""

from __future__ import annotations

from dataclasses import dataclass

from infra_pulumi.catalogue import Catalogue, InstanceType
from infra_pulumi.spec import ClusterSpec

# Memory that kubelet and the system reserve, as (GiB, share) of consecutive parts. Source: Google's "Plan node sizes".
# EKS and AKS (with 110 pods per node) reserve less.
_RESERVED = ((4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06))
_REST = 0.02
_EVICTION_GIB = 0.1  # kubelet evicts pods before the last 100 MiB
_FIRMWARE = 0.04  # share of a machine's memory that the kernel does not see
_DAEMONS_GIB = 1.0  # device plugin, exporters and network agents


@dataclass(frozen=True, slots=True)
class PodSize:
    """A worker pod's resources: requested CPUs, CPU limit, memory in GiB, number of GPUs."""

    cpus: int
    cpu_limit: int
    memory_gib: int
    gpus: int


def allocatable_gib(memory_gib: float) -> float:
    """Memory in GiB that a pod can use on a node with `memory_gib`."""
    visible = rest = memory_gib * (1 - _FIRMWARE)
    reserved = _EVICTION_GIB
    for width, share in _RESERVED:
        part = min(rest, width)
        reserved += part * share
        rest -= part
    return visible - reserved - rest * _REST - _DAEMONS_GIB


def machines(spec: ClusterSpec, catalogue: Catalogue, index: int) -> tuple[InstanceType, ...]:
    """The machines of GPU pool number `index`, in order. Raises CatalogueError for an unknown machine."""
    return tuple(catalogue.get(spec.provider, name) for name in spec.gpu_pools[index].instance_types)


def pod_size(spec: ClusterSpec, catalogue: Catalogue, index: int) -> PodSize:
    """The resources that a worker pod can have on each of the pool's machines. Raises CatalogueError."""
    choices = machines(spec, catalogue, index)
    vcpu = min(each.vcpu for each in choices)
    return PodSize(
        cpus=vcpu - 1,
        cpu_limit=vcpu,
        memory_gib=int(allocatable_gib(min(each.memory_gib for each in choices))),
        gpus=min(each.gpu_count for each in choices),
    )


def gpus(spec: ClusterSpec, catalogue: Catalogue) -> int:
    """The number of GPUs of all pools at their maximum size. Raises CatalogueError."""
    return sum(pool.max * pod_size(spec, catalogue, index).gpus for index, pool in enumerate(spec.gpu_pools))
