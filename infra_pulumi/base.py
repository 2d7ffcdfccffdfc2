"""What the three clouds have in common: one component, its arguments and its outputs."""

from __future__ import annotations

import hashlib
import importlib
import ipaddress
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pulumi

from infra_pulumi.catalogue import Catalogue, InstanceType
from infra_pulumi.spec import POOL_LABEL, ClusterSpec, GpuPool, NodeGroup

ACCELERATOR_LABEL = "serve-app/accelerator"
CAPACITY_LABEL = "serve-app/capacity"
GPU_TAINT = ("nvidia.com/gpu", "present", "NoSchedule")
# What each cloud calls the component, after the file that has it.
_CLASSES = {"aws": "AwsCluster", "gcp": "GcpCluster", "azure": "AzureCluster"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """What every cloud tells of its cluster.

    `kubeconfig_command` makes kubectl able to reach it. `registry` is where its images are pushed to. `identity` is
    what the service's pods are to the cloud: a role, a service account, a managed identity.
    """

    cluster_name: pulumi.Input[str]
    endpoint: pulumi.Input[str]
    registry: pulumi.Input[str]
    kubeconfig_command: pulumi.Input[str]
    identity: pulumi.Input[str]
    node_groups: Sequence[pulumi.Input[str]]

    def plain(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class Access:
    """How Kubernetes' API is reached. None of it is secret.

    `authority` is what its certificate is signed by, as PEM in base64. `command` prints a token that ends soon, for
    whoever runs it.
    """

    server: pulumi.Input[str]
    authority: pulumi.Input[str]
    command: tuple[str, ...]


class GpuCluster(pulumi.ComponentResource):
    """A Kubernetes cluster with a CPU system pool and GPU pools that scale from zero.

    Subclasses make it of one cloud's resources. What they ask of the cloud, a plan answers with a name in `${}`.
    `month` is the first day of this month, from which on Azure counts a budget.
    """

    def __init__(self, spec: ClusterSpec, catalogue: Catalogue, month: str) -> None:
        super().__init__("serve-app:infra:GpuCluster", spec.name)
        self.spec = spec
        self.catalogue = catalogue
        self.month = month
        self.outputs = self.create()
        self.register_outputs(self.outputs.plain())

    @abstractmethod
    def create(self) -> Outputs:
        """Make everything."""

    @abstractmethod
    def access(self) -> Access:
        """The way into the cluster, once it is made."""

    def under(self, **options: Any) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(parent=self, **options)

    def kept(self, **options: Any) -> pulumi.ResourceOptions:
        """For what must not be lost: Pulumi refuses to delete it while the description says `protect`."""
        return self.under(protect=self.spec.protect, **options)

    def name(self, *parts: str) -> str:
        return "-".join((self.spec.name, *parts))

    def machine(self, pool: GpuPool) -> InstanceType:
        """The first of a pool's types. The others have the same GPUs, or the catalogue's check has refused them."""
        return self.catalogue.get(self.spec.provider, pool.instance_types[0])

    def zones(self, pool: GpuPool) -> tuple[str, ...]:
        return self.catalogue.zones(self.spec, pool)

    def pool_name(self, group: NodeGroup, *parts: str) -> str:
        """Of a node group's resources; whatever the pool is called, it is none of the cluster's own."""
        return self.name("pool", group.name, *parts)

    def principals(self) -> dict[str, str]:
        """Administrators, by a name that stays theirs whoever else comes or goes."""
        return {hashlib.sha256(each.encode()).hexdigest()[:8]: each for each in self.spec.administrators}

    def labels(self, group: NodeGroup) -> dict[str, str]:
        """Of a GPU node. A pool that is in two node groups has the same label on both."""
        machine = self.machine(group.pool)
        return {
            **group.pool.labels,
            POOL_LABEL: group.pool.name,
            ACCELERATOR_LABEL: accelerator(machine),
            CAPACITY_LABEL: "spot" if group.spot else "on-demand",
        }

    def taints(self, group: NodeGroup) -> list[tuple[str, str, str]]:
        return [GPU_TAINT, *((each.key, each.value, each.effect) for each in group.pool.taints)]


def accelerator(machine: InstanceType) -> str:
    """`H100 NVL` as the value of a label."""
    return str(machine.gpu).lower().replace(" ", "-")


def private_blocks(cidr: str, count: int) -> list[str]:
    """An eighth of the range each, for up to six zones."""
    return [str(each) for each in list(ipaddress.IPv4Network(cidr).subnets(prefixlen_diff=3))[:count]]


def public_blocks(cidr: str, count: int) -> list[str]:
    """Parts of the last eighth: they hold load balancers and NAT only."""
    last = list(ipaddress.IPv4Network(cidr).subnets(prefixlen_diff=3))[7]
    return [str(each) for each in list(last.subnets(prefixlen_diff=3))[:count]]


def build(spec: ClusterSpec, catalogue: Catalogue, month: str) -> GpuCluster:
    """The component of the description's cloud. Only that cloud's SDK is loaded, and only now."""
    module = importlib.import_module(f"infra_pulumi.{spec.provider}")
    cluster: GpuCluster = getattr(module, _CLASSES[spec.provider])(spec, catalogue, month)
    return cluster
