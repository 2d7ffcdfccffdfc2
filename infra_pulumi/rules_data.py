"""Rules about what is encrypted, what is written down, and whose it is."""

from __future__ import annotations

from infra_pulumi.policy import HOUSE, Broken, expected, get, inline_pools, rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

# Where those have their tags that can have some.
_TAGS = {
    "aws.ec2.Vpc": "tags",
    "aws.ec2.Subnet": "tags",
    "aws.ec2.NatGateway": "tags",
    "aws.ec2.LaunchTemplate": "tags",
    "aws.eks.Cluster": "tags",
    "aws.eks.NodeGroup": "tags",
    "aws.kms.Key": "tags",
    "aws.iam.Role": "tags",
    "aws.ecr.Repository": "tags",
    "gcp.container.Cluster": "resourceLabels",
    "gcp.container.NodePool": "nodeConfig.resourceLabels",
    "gcp.artifactregistry.Repository": "labels",
    "azure-native.resources.ResourceGroup": "tags",
    "azure-native.containerservice.ManagedCluster": "tags",
    "azure-native.containerservice.AgentPool": "tags",
    "azure-native.containerregistry.Registry": "tags",
    "azure-native.network.VirtualNetwork": "tags",
}


@rule("disk-not-encrypted", "error", HOUSE)
def _disks_are_encrypted(recording: Recording, spec: ClusterSpec) -> Broken:
    """Weights, prompts and tokens are on disks. (Google encrypts every disk.)"""
    for resource in recording.of("aws.ec2.LaunchTemplate"):
        for mapping in resource.inputs.get("blockDeviceMappings", []):
            if get(mapping, "ebs.encrypted") != "true":
                yield resource.name, f"{mapping.get('deviceName')} is not encrypted"
    for resource in recording.of("azure-native.containerservice.AgentPool"):
        if not resource.inputs.get("enableEncryptionAtHost"):
            yield resource.name, "enableEncryptionAtHost is not set"
    for cluster, pool in inline_pools(recording):
        if not pool.get("enableEncryptionAtHost"):
            yield cluster, f"pool {pool.get('name')}: enableEncryptionAtHost is not set"


@rule("secrets-not-encrypted", "error", HOUSE)
def _secrets_are_encrypted(recording: Recording, spec: ClusterSpec) -> Broken:
    """Kubernetes keeps secrets in plain text unless a key of one's own is named."""
    for resource in recording.of("aws.eks.Cluster"):
        if "secrets" not in (get(resource.inputs, "encryptionConfig.resources") or []):
            yield resource.name, "encryptionConfig does not name secrets"


expected(
    "key-not-rotated",
    "error",
    "aws.kms.Key",
    "enableKeyRotation",
    True,
    "A key that never changes leaks once for ever.",
    HOUSE,
)


@rule("key-deleted-at-once", "warning", HOUSE)
def _keys_wait(recording: Recording, spec: ClusterSpec) -> Broken:
    """What a deleted key had encrypted is lost: there has to be time to notice."""
    for resource in recording.of("aws.kms.Key"):
        if resource.inputs.get("deletionWindowInDays", 30) < 14:
            yield resource.name, f"deletionWindowInDays is {resource.inputs['deletionWindowInDays']}"


@rule("control-plane-not-logged", "error", HOUSE)
def _audit_logs(recording: Recording, spec: ClusterSpec) -> Broken:
    """Who did what cannot be found out afterwards if nobody wrote it down."""
    for resource in recording.of("aws.eks.Cluster"):
        if missing := {"api", "audit", "authenticator"} - set(resource.inputs.get("enabledClusterLogTypes", [])):
            yield resource.name, f"no logs of {', '.join(sorted(missing))}"
    for resource in recording.of("gcp.container.Cluster"):
        if "APISERVER" not in (get(resource.inputs, "loggingConfig.enableComponents") or []):
            yield resource.name, "no logs of APISERVER"
    logged = {
        log["category"]
        for setting in recording.of("azure-native.monitor.DiagnosticSetting")
        for log in setting.inputs.get("logs", [])
        if log.get("enabled")
    }
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not logged & {"kube-audit", "kube-audit-admin"}:
            yield resource.name, "no logs of kube-audit-admin"


@rule("logs-kept-for-ever", "warning", HOUSE)
def _logs_end(recording: Recording, spec: ClusterSpec) -> Broken:
    """Logs without an end cost more every month."""
    for resource in recording.of("aws.cloudwatch.LogGroup"):
        if not resource.inputs.get("retentionInDays"):
            yield resource.name, "retentionInDays is not set"
    for resource in recording.of("azure-native.operationalinsights.Workspace"):
        if not resource.inputs.get("retentionInDays"):
            yield resource.name, "retentionInDays is not set"


@rule("image-changes-under-its-tag", "error", HOUSE)
def _images_stay(recording: Recording, spec: ClusterSpec) -> Broken:
    """What was tested is what runs only if a tag cannot be moved."""
    for resource in recording.of("aws.ecr.Repository"):
        if resource.inputs.get("imageTagMutability") != "IMMUTABLE":
            yield resource.name, "imageTagMutability is not IMMUTABLE"
    for resource in recording.of("gcp.artifactregistry.Repository"):
        if not get(resource.inputs, "dockerConfig.immutableTags"):
            yield resource.name, "dockerConfig.immutableTags is not set"


expected(
    "image-not-scanned",
    "warning",
    "aws.ecr.Repository",
    "imageScanningConfiguration.scanOnPush",
    True,
    "Known holes are found when an image comes, not when it is used.",
    HOUSE,
)


@rule("tags-missing", "error", "add them in the component: all_tags()")
def _tagged(recording: Recording, spec: ClusterSpec) -> Broken:
    """What has no tags is in nobody's budget."""
    for resource in recording.resources:
        if (path := _TAGS.get(resource.kind)) is None:
            continue
        tags = get(resource.inputs, path) or {}
        if missing := [key for key, value in spec.all_tags().items() if tags.get(key) != value]:
            yield resource.name, f"{path} lacks {', '.join(missing)}"
