"""The cluster component that the three clouds implement, with its outputs and shared names."""

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
# The component class of each provider, in the module of that name.
_CLASSES = {"aws": "AwsCluster", "gcp": "GcpCluster", "azure": "AzureCluster"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a cluster, the same for every cloud.

    `kubeconfig_command` configures kubectl for the cluster. `registry` is the target for image pushes. `identity` is
    the cloud identity of the service's pods: a role ARN, a service account's address or a managed identity's client id.
    """

    cluster_name: pulumi.Input[str]
    endpoint: pulumi.Input[str]
    registry: pulumi.Input[str]
    kubeconfig_command: pulumi.Input[str]
    identity: pulumi.Input[str]
    node_groups: Sequence[pulumi.Input[str]]

    def as_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the Kubernetes API. It contains no secrets.

    `certificate_authority` is PEM in base64. `command` prints a short-lived token for the user who runs it.
    """

    server: pulumi.Input[str]
    certificate_authority: pulumi.Input[str]
    command: tuple[str, ...]


class GpuCluster(pulumi.ComponentResource):
    """A Kubernetes cluster with a CPU system pool and GPU pools that scale from zero.

    A subclass creates the resources of one cloud. In a plan, values that only the cloud knows are written as `${name}`.
    `month` is the first day of the current month in RFC 3339, the start date of a budget on Azure.
    """

    def __init__(self, spec: ClusterSpec, catalogue: Catalogue, month: str) -> None:
        super().__init__("serve-app:infra:GpuCluster", spec.name)
        self.spec = spec
        self.catalogue = catalogue
        self.month = month
        self.outputs = self.create()
        self.register_outputs(self.outputs.as_dict())

    @abstractmethod
    def create(self) -> Outputs:
        """Create all resources."""

    @abstractmethod
    def access(self) -> Access:
        """Access to the Kubernetes API of the created cluster."""

    def child_options(self, **options: Any) -> pulumi.ResourceOptions:
        """Options of a resource below this component."""
        return pulumi.ResourceOptions(parent=self, **options)

    def protected_options(self, **options: Any) -> pulumi.ResourceOptions:
        """Options of a resource that Pulumi refuses to delete while the description has `protect: true`."""
        return self.child_options(protect=self.spec.protect, **options)

    def name(self, *parts: str) -> str:
        """A resource name that begins with the cluster's name."""
        return "-".join((self.spec.name, *parts))

    def machine(self, pool: GpuPool) -> InstanceType:
        """The first instance type of a pool. `catalogue.check` ensures that all types of a pool have the same GPUs."""
        return self.catalogue.get(self.spec.provider, pool.instance_types[0])

    def zones(self, pool: GpuPool) -> tuple[str, ...]:
        return self.catalogue.zones(self.spec, pool)

    def pool_name(self, group: NodeGroup, *parts: str) -> str:
        """A name for a node group's resources that cannot collide with the cluster's other resources."""
        return self.name("pool", group.name, *parts)

    def principals(self) -> dict[str, str]:
        """Administrators by a hash of their name, so that adding or removing one does not rename the others."""
        return {hashlib.sha256(each.encode()).hexdigest()[:8]: each for each in self.spec.administrators}

    def labels(self, group: NodeGroup) -> dict[str, str]:
        """Labels of a GPU node. Both node groups of a pool have the same pool label."""
        machine = self.machine(group.pool)
        return {
            **group.pool.labels,
            POOL_LABEL: group.pool.name,
            ACCELERATOR_LABEL: accelerator(machine),
            CAPACITY_LABEL: "spot" if group.spot else "on-demand",
        }

    def taints(self, group: NodeGroup) -> list[tuple[str, str, str]]:
        """Taints of a GPU node as (key, value, effect)."""
        return [GPU_TAINT, *((each.key, each.value, each.effect) for each in group.pool.taints)]


def accelerator(machine: InstanceType) -> str:
    """The GPU's name as a label value: `H100 NVL` becomes `h100-nvl`."""
    return str(machine.gpu).lower().replace(" ", "-")


def private_blocks(cidr: str, count: int) -> list[str]:
    """CIDR blocks of the private subnets: one eighth of the range for each of up to six zones."""
    return [str(each) for each in list(ipaddress.IPv4Network(cidr).subnets(prefixlen_diff=3))[:count]]


def public_blocks(cidr: str, count: int) -> list[str]:
    """CIDR blocks of the public subnets, from the last eighth of the range: they hold only load balancers and NAT."""
    last = list(ipaddress.IPv4Network(cidr).subnets(prefixlen_diff=3))[7]
    return [str(each) for each in list(last.subnets(prefixlen_diff=3))[:count]]


def build(spec: ClusterSpec, catalogue: Catalogue, month: str) -> GpuCluster:
    """Create the component of the description's cloud. Imports that cloud's SDK only."""
    module = importlib.import_module(f"infra_pulumi.{spec.provider}")
    cluster: GpuCluster = getattr(module, _CLASSES[spec.provider])(spec, catalogue, month)
    return cluster
