"""Rules about what keeps running, what it costs, and production."""

from __future__ import annotations

from infra_pulumi.policy import HOUSE, Broken, get, gpu_pools, inline_pools, of, rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

KUBERNETES = {"aws.eks.Cluster", "gcp.container.Cluster", "azure-native.containerservice.ManagedCluster"}


@rule("spot-for-the-head", "error", "the system pool is on demand; spot is for GPU pools")
def _system_is_on_demand(recording: Recording, spec: ClusterSpec) -> Broken:
    """Ray's head is on the system pool: when it is reclaimed, everything stops."""
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


@rule("gpu-without-taint", "error", HOUSE)
def _gpu_pools_are_tainted(recording: Recording, spec: ClusterSpec) -> Broken:
    """Without it anything may run on a GPU node, and it never goes away. (GKE adds its own.)"""
    for resource in gpu_pools(recording, "aws.eks.NodeGroup", "labels"):
        if "nvidia.com/gpu" not in {taint.get("key") for taint in resource.inputs.get("taints", [])}:
            yield resource.name, "no taint nvidia.com/gpu"
    for resource in gpu_pools(recording, "azure-native.containerservice.AgentPool", "nodeLabels"):
        if not any(taint.startswith("nvidia.com/gpu=") for taint in resource.inputs.get("nodeTaints", [])):
            yield resource.name, "no taint nvidia.com/gpu"


@rule("taint-twice-on-gke", "error", HOUSE)
def _gke_taints_itself(recording: Recording, spec: ClusterSpec) -> Broken:
    """GKE adds the GPU taint, and refuses a pool that has it twice (terraform-provider-google#7928)."""
    for resource in gpu_pools(recording, "gcp.container.NodePool", "nodeConfig.labels"):
        if any(taint.get("key") == "nvidia.com/gpu" for taint in get(resource.inputs, "nodeConfig.taints") or []):
            yield resource.name, "nodeConfig.taints has nvidia.com/gpu"


@rule("update-fights-the-autoscaler", "error", HOUSE)
def _counts_are_ignored(recording: Recording, spec: ClusterSpec) -> Broken:
    """An update that sets the number of nodes stops those that serve."""
    ignored = {
        "aws.eks.NodeGroup": "scalingConfig.desiredSize",
        "gcp.container.NodePool": "nodeCount",
        "azure-native.containerservice.AgentPool": "count",
    }
    for kind, field in ignored.items():
        for resource in recording.of(kind):
            if field not in resource.ignore_changes:
                yield resource.name, f"{field} is not in ignore_changes"


@rule("never-scales-from-zero", "error", HOUSE)
def _autoscaler_knows(recording: Recording, spec: ClusterSpec) -> Broken:
    """An empty group is known by the tags of its autoscaling group alone (kubernetes/autoscaler#3869, #8799)."""
    tagged: dict[str, set[str]] = {}
    for tag in recording.of("aws.autoscaling.Tag"):
        group = str(tag.inputs.get("autoscalingGroupName"))
        tagged.setdefault(group, set()).add(str(get(tag.inputs, "tag.key")).partition("node-template/")[2])
    for resource in gpu_pools(recording, "aws.eks.NodeGroup", "labels"):
        needed = {"resources/nvidia.com/gpu", "taint/nvidia.com/gpu", "label/k8s.amazonaws.com/accelerator"}
        has = tagged.get(f"${{{resource.name}.autoscalingGroup}}", set())
        if missing := sorted(needed - has):
            yield resource.name, f"its autoscaling group lacks {', '.join(missing)}"


@rule("gpu-ami-on-cpu-or-none-on-gpu", "error", HOUSE)
def _right_image(recording: Recording, spec: ClusterSpec) -> Broken:
    """Without the driver's image no GPU is ever seen; Amazon Linux 2 has ended."""
    for resource in gpu_pools(recording, "aws.eks.NodeGroup", "labels"):
        if "NVIDIA" not in str(resource.inputs.get("amiType")):
            yield resource.name, f"amiType is {resource.inputs.get('amiType')}"
    for resource in gpu_pools(recording, "gcp.container.NodePool", "nodeConfig.labels"):
        driver = get(resource.inputs, "nodeConfig.guestAccelerators.0.gpuDriverInstallationConfig.gpuDriverVersion")
        if driver not in ("DEFAULT", "LATEST"):
            yield resource.name, "no driver is installed"
    for resource in gpu_pools(recording, "azure-native.containerservice.AgentPool", "nodeLabels"):
        if get(resource.inputs, "gpuProfile.driver") != "Install":
            yield resource.name, "gpuProfile.driver is not Install"


@rule("extended-support", "warning", HOUSE)
def _standard_support(recording: Recording, spec: ClusterSpec) -> Broken:
    """An EKS cluster in extended support costs six times as much, and nobody is told."""
    for resource in recording.of("aws.eks.Cluster"):
        if get(resource.inputs, "upgradePolicy.supportType") != "STANDARD":
            yield resource.name, "upgradePolicy.supportType is not STANDARD"


@rule("no-budget", "warning", "set budget.monthly_usd and budget.emails")
def _budget(recording: Recording, spec: ClusterSpec) -> Broken:
    """A forgotten GPU costs more than everything else together."""
    if not list(of(recording, {"aws.budgets.Budget", "gcp.billing.Budget", "azure-native.consumption.Budget"})):
        yield spec.name, "there is no budget"


@rule("budget-tells-nobody", "warning", "set budget.emails")
def _budget_has_readers(recording: Recording, spec: ClusterSpec) -> Broken:
    """An alarm without an address is none."""
    for resource in recording.of("aws.budgets.Budget"):
        if not any(each.get("subscriberEmailAddresses") for each in resource.inputs.get("notifications", [])):
            yield resource.name, "no notification has an address"
    for resource in recording.of("azure-native.consumption.Budget"):
        if not any(each.get("contactEmails") for each in resource.inputs.get("notifications", {}).values()):
            yield resource.name, "only the subscription's owners are told"


@rule("production-can-be-deleted", "error", "set protect: true")
def _protected(recording: Recording, spec: ClusterSpec) -> Broken:
    """One wrong command must not end the service."""
    if not spec.production:
        return
    for resource in of(
        recording, KUBERNETES | {"aws.kms.Key", "aws.ecr.Repository", "azure-native.resources.ResourceGroup"}
    ):
        if not resource.protect:
            yield resource.name, "Pulumi would delete it"
    for resource in of(recording, {"aws.eks.Cluster", "gcp.container.Cluster"}):
        if not resource.inputs.get("deletionProtection"):
            yield resource.name, "deletionProtection is not set"
    if spec.provider == "azure" and not recording.of("azure-native.authorization.ManagementLockByScope"):
        yield spec.name, "no lock is on the resource group"


@rule("production-in-one-zone", "error", "name two zones or more")
def _several_zones(recording: Recording, spec: ClusterSpec) -> Broken:
    """A zone fails as a whole."""
    if spec.production and len(spec.zones) < 2:
        yield spec.name, f"everything is in {', '.join(spec.zones)}"


@rule("production-behind-one-nat", "warning", "set network.nat: per-zone")
def _nat_in_each_zone(recording: Recording, spec: ClusterSpec) -> Broken:
    """With the zone of the only NAT no node can pull an image."""
    gateways = recording.of("aws.ec2.NatGateway")
    if spec.production and spec.provider == "aws" and len(gateways) < len(spec.zones):
        yield gateways[0].name if gateways else spec.name, f"{len(gateways)} for {len(spec.zones)} zones"


@rule("production-all-on-spot", "warning", "set on_demand_base, or a second pool without spot")
def _something_stays(recording: Recording, spec: ClusterSpec) -> Broken:
    """Spot machines of one kind are reclaimed together."""
    if spec.production and all(group.spot for group in spec.node_groups()):
        yield spec.name, "every GPU node may be reclaimed at once"
