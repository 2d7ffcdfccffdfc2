"""Policy rules about availability, autoscaling, budgets and production."""

from __future__ import annotations

from infra_pulumi.policy import COMPONENT_REMEDY, Violations, get, gpu_pools, inline_pools, resources_of, rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

KUBERNETES = {"aws.eks.Cluster", "gcp.container.Cluster", "azure-native.containerservice.ManagedCluster"}


@rule("spot-for-the-head", "error", "use on-demand nodes in the system pool; spot is for GPU pools")
def _system_is_on_demand(recording: Recording, spec: ClusterSpec) -> Violations:
    """Ray's head runs in the system pool and must not be interrupted."""
    for resource in recording.of("aws.eks.NodeGroup"):
        if (
            get(resource.inputs, "labels.serve-app/pool") == "system"
            and resource.inputs.get("capacityType") != "ON_DEMAND"
        ):
            yield resource.name, f"capacityType is {resource.inputs.get('capacityType')}"
    for resource in recording.of("gcp.container.NodePool"):
        if get(resource.inputs, "nodeConfig.labels.serve-app/pool") == "system" and get(
            resource.inputs, "nodeConfig.spot"
        ):
            yield resource.name, "nodeConfig.spot is set"
    for cluster, pool in inline_pools(recording):
        if pool.get("scaleSetPriority") == "Spot":
            yield cluster, f"pool {pool['name']} has scaleSetPriority Spot"


@rule("gpu-without-taint", "error", COMPONENT_REMEDY)
def _gpu_pools_are_tainted(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without the taint, any pod can run on a GPU node and keep it from scaling down. GKE adds the taint itself."""
    for resource in gpu_pools(recording, "aws.eks.NodeGroup", "labels"):
        if "nvidia.com/gpu" not in {taint.get("key") for taint in resource.inputs.get("taints", [])}:
            yield resource.name, "the taint nvidia.com/gpu is missing"
    for resource in gpu_pools(recording, "azure-native.containerservice.AgentPool", "nodeLabels"):
        if not any(taint.startswith("nvidia.com/gpu=") for taint in resource.inputs.get("nodeTaints", [])):
            yield resource.name, "the taint nvidia.com/gpu is missing"


@rule("taint-twice-on-gke", "error", COMPONENT_REMEDY)
def _gke_taints_itself(recording: Recording, spec: ClusterSpec) -> Violations:
    """GKE adds the GPU taint and refuses a duplicate (terraform-provider-google#7928)."""
    for resource in gpu_pools(recording, "gcp.container.NodePool", "nodeConfig.labels"):
        if any(taint.get("key") == "nvidia.com/gpu" for taint in get(resource.inputs, "nodeConfig.taints") or []):
            yield resource.name, "nodeConfig.taints contains nvidia.com/gpu"


@rule("update-fights-the-autoscaler", "error", COMPONENT_REMEDY)
def _counts_are_ignored(recording: Recording, spec: ClusterSpec) -> Violations:
    """An update that sets the number of nodes removes nodes that serve requests."""
    ignored = {
        "aws.eks.NodeGroup": "scalingConfig.desiredSize",
        "gcp.container.NodePool": "nodeCount",
        "azure-native.containerservice.AgentPool": "count",
    }
    for kind, field in ignored.items():
        for resource in recording.of(kind):
            if field not in resource.ignore_changes:
                yield resource.name, f"{field} is not in ignore_changes"


@rule("never-scales-from-zero", "error", COMPONENT_REMEDY)
def _autoscaler_knows(recording: Recording, spec: ClusterSpec) -> Violations:
    """The autoscaler knows an empty group only by its tags (kubernetes/autoscaler#3869, #8799)."""
    tagged: dict[str, set[str]] = {}
    for tag in recording.of("aws.autoscaling.Tag"):
        group = str(tag.inputs.get("autoscalingGroupName"))
        tagged.setdefault(group, set()).add(str(get(tag.inputs, "tag.key")).partition("node-template/")[2])
    for resource in gpu_pools(recording, "aws.eks.NodeGroup", "labels"):
        required = {"resources/nvidia.com/gpu", "taint/nvidia.com/gpu", "label/k8s.amazonaws.com/accelerator"}
        present = tagged.get(f"${{{resource.name}.autoscalingGroup}}", set())
        if missing := sorted(required - present):
            yield resource.name, f"its Auto Scaling group lacks the tags {', '.join(missing)}"


@rule("gpu-ami-on-cpu-or-none-on-gpu", "error", COMPONENT_REMEDY)
def _right_image(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without a driver, Kubernetes sees no GPU. Amazon Linux 2 is out of support."""
    for resource in gpu_pools(recording, "aws.eks.NodeGroup", "labels"):
        if "NVIDIA" not in str(resource.inputs.get("amiType")):
            yield resource.name, f"amiType is {resource.inputs.get('amiType')}"
    for resource in gpu_pools(recording, "gcp.container.NodePool", "nodeConfig.labels"):
        driver = get(resource.inputs, "nodeConfig.guestAccelerators.0.gpuDriverInstallationConfig.gpuDriverVersion")
        if driver not in ("DEFAULT", "LATEST"):
            yield resource.name, "gpuDriverInstallationConfig installs no driver"
    for resource in gpu_pools(recording, "azure-native.containerservice.AgentPool", "nodeLabels"):
        if get(resource.inputs, "gpuProfile.driver") != "Install":
            yield resource.name, "gpuProfile.driver is not Install"


@rule("extended-support", "warning", COMPONENT_REMEDY)
def _standard_support(recording: Recording, spec: ClusterSpec) -> Violations:
    """EKS charges six times the price for extended support, without a notification."""
    for resource in recording.of("aws.eks.Cluster"):
        if get(resource.inputs, "upgradePolicy.supportType") != "STANDARD":
            yield resource.name, "upgradePolicy.supportType is not STANDARD"


@rule("no-budget", "warning", "set budget.monthly_usd and budget.emails")
def _budget(recording: Recording, spec: ClusterSpec) -> Violations:
    """A forgotten GPU node costs more than the rest of the cluster."""
    if not list(
        resources_of(recording, {"aws.budgets.Budget", "gcp.billing.Budget", "azure-native.consumption.Budget"})
    ):
        yield spec.name, "the description has no budget"


@rule("budget-tells-nobody", "warning", "set budget.emails")
def _budget_has_readers(recording: Recording, spec: ClusterSpec) -> Violations:
    """An alert without a recipient has no effect."""
    for resource in recording.of("aws.budgets.Budget"):
        if not any(each.get("subscriberEmailAddresses") for each in resource.inputs.get("notifications", [])):
            yield resource.name, "no notification has an e-mail address"
    for resource in recording.of("azure-native.consumption.Budget"):
        if not any(each.get("contactEmails") for each in resource.inputs.get("notifications", {}).values()):
            yield resource.name, "notifications go only to the subscription's owners"


@rule("production-can-be-deleted", "error", "set protect: true")
def _protected(recording: Recording, spec: ClusterSpec) -> Violations:
    """One wrong command must not delete the service."""
    if not spec.production:
        return
    for resource in resources_of(
        recording, KUBERNETES | {"aws.kms.Key", "aws.ecr.Repository", "azure-native.resources.ResourceGroup"}
    ):
        if not resource.protect:
            yield resource.name, "protect is not set, so that Pulumi can delete it"
    for resource in resources_of(recording, {"aws.eks.Cluster", "gcp.container.Cluster"}):
        if not resource.inputs.get("deletionProtection"):
            yield resource.name, "deletionProtection is not set"
    if spec.provider == "azure" and not recording.of("azure-native.authorization.ManagementLockByScope"):
        yield spec.name, "the resource group has no lock"


@rule("production-in-one-zone", "error", "list at least two zones")
def _several_zones(recording: Recording, spec: ClusterSpec) -> Violations:
    """A zone can fail as a whole."""
    if spec.production and len(spec.zones) < 2:
        yield spec.name, f"all resources are in {', '.join(spec.zones)}"


@rule("production-behind-one-nat", "warning", "set network.nat: per-zone")
def _nat_in_each_zone(recording: Recording, spec: ClusterSpec) -> Violations:
    """If the zone of the only NAT gateway fails, no node can pull images."""
    gateways = recording.of("aws.ec2.NatGateway")
    if spec.production and spec.provider == "aws" and len(gateways) < len(spec.zones):
        yield gateways[0].name if gateways else spec.name, f"{len(gateways)} NAT gateway(s) for {len(spec.zones)} zones"


@rule("production-all-on-spot", "warning", "set on_demand_base, or add a pool without spot")
def _some_nodes_on_demand(recording: Recording, spec: ClusterSpec) -> Violations:
    """The cloud reclaims spot machines of one type at the same time."""
    if spec.production and all(group.spot for group in spec.node_groups()):
        yield spec.name, "all GPU nodes are spot nodes"
