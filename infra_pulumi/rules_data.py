"""Policy rules about encryption, logs, images and tags."""

from __future__ import annotations

from infra_pulumi.policy import COMPONENT_REMEDY, Violations, get, inline_pools, rule, value_rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

# The path of the tags of each kind that can have tags.
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


@rule("disk-not-encrypted", "error", COMPONENT_REMEDY)
def _disks_are_encrypted(recording: Recording, spec: ClusterSpec) -> Violations:
    """Disks contain weights, prompts and tokens. Google encrypts every disk."""
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


@rule("secrets-not-encrypted", "error", COMPONENT_REMEDY)
def _secrets_are_encrypted(recording: Recording, spec: ClusterSpec) -> Violations:
    """Kubernetes stores secrets in plain text unless a KMS key is configured."""
    for resource in recording.of("aws.eks.Cluster"):
        if "secrets" not in (get(resource.inputs, "encryptionConfig.resources") or []):
            yield resource.name, "encryptionConfig.resources does not contain secrets"


value_rule(
    "key-not-rotated",
    "error",
    "aws.kms.Key",
    "enableKeyRotation",
    True,
    "A leaked key stays valid until it is rotated.",
    COMPONENT_REMEDY,
)


@rule("key-deleted-at-once", "warning", COMPONENT_REMEDY)
def _keys_wait(recording: Recording, spec: ClusterSpec) -> Violations:
    """Data encrypted with a deleted key is lost; a waiting period allows to cancel the deletion."""
    for resource in recording.of("aws.kms.Key"):
        if resource.inputs.get("deletionWindowInDays", 30) < 14:
            yield resource.name, f"deletionWindowInDays is {resource.inputs['deletionWindowInDays']}"


@rule("control-plane-not-logged", "error", COMPONENT_REMEDY)
def _audit_logs(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without audit logs, an incident cannot be investigated."""
    for resource in recording.of("aws.eks.Cluster"):
        if missing := {"api", "audit", "authenticator"} - set(resource.inputs.get("enabledClusterLogTypes", [])):
            yield resource.name, f"the logs {', '.join(sorted(missing))} are not enabled"
    for resource in recording.of("gcp.container.Cluster"):
        if "APISERVER" not in (get(resource.inputs, "loggingConfig.enableComponents") or []):
            yield resource.name, "the logs of APISERVER are not enabled"
    logged = {
        log["category"]
        for setting in recording.of("azure-native.monitor.DiagnosticSetting")
        for log in setting.inputs.get("logs", [])
        if log.get("enabled")
    }
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not logged & {"kube-audit", "kube-audit-admin"}:
            yield resource.name, "the logs kube-audit-admin are not enabled"


@rule("logs-kept-for-ever", "warning", COMPONENT_REMEDY)
def _logs_expire(recording: Recording, spec: ClusterSpec) -> Violations:
    """Logs that never expire cost more every month."""
    for resource in recording.of("aws.cloudwatch.LogGroup"):
        if not resource.inputs.get("retentionInDays"):
            yield resource.name, "retentionInDays is not set"
    for resource in recording.of("azure-native.operationalinsights.Workspace"):
        if not resource.inputs.get("retentionInDays"):
            yield resource.name, "retentionInDays is not set"


@rule("image-changes-under-its-tag", "error", COMPONENT_REMEDY)
def _tags_are_immutable(recording: Recording, spec: ClusterSpec) -> Violations:
    """A tag that can move may refer to an image that was never tested."""
    for resource in recording.of("aws.ecr.Repository"):
        if resource.inputs.get("imageTagMutability") != "IMMUTABLE":
            yield resource.name, "imageTagMutability is not IMMUTABLE"
    for resource in recording.of("gcp.artifactregistry.Repository"):
        if not get(resource.inputs, "dockerConfig.immutableTags"):
            yield resource.name, "dockerConfig.immutableTags is not set"


value_rule(
    "image-not-scanned",
    "warning",
    "aws.ecr.Repository",
    "imageScanningConfiguration.scanOnPush",
    True,
    "A scan on push finds known vulnerabilities before the image runs.",
    COMPONENT_REMEDY,
)


@rule("tags-missing", "error", "set the tags of ClusterSpec.all_tags() in the component")
def _tagged(recording: Recording, spec: ClusterSpec) -> Violations:
    """Budgets do not include resources without tags."""
    for resource in recording.resources:
        if (path := _TAGS.get(resource.kind)) is None:
            continue
        tags = get(resource.inputs, path) or {}
        if missing := [key for key, value in spec.all_tags().items() if tags.get(key) != value]:
            yield resource.name, f"{path} lacks {', '.join(missing)}"
