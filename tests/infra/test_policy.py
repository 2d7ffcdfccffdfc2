"""The policy rules: the shipped clusters have no findings, and each rule finds the fault it was written for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest

from infra_pulumi import policy
from infra_pulumi.record import Recording, Resource
from infra_pulumi.spec import Provider, parse
from tests.infra.helpers import document, full, planned, recorded

pytestmark = pytest.mark.infra

CLUSTERS = {
    "aws": "aws.eks.Cluster",
    "gcp": "gcp.container.Cluster",
    "azure": "azure-native.containerservice.ManagedCluster",
}
POOL = "azure-native.containerservice.AgentPool"
AKS = CLUSTERS["azure"]
GKE = CLUSTERS["gcp"]
EKS = CLUSTERS["aws"]


@pytest.mark.parametrize("provider", get_args(Provider))
def test_the_full_description_has_no_findings(provider: str) -> None:
    assert policy.findings(recorded(provider), full(provider)) == ()


@pytest.mark.parametrize("provider", get_args(Provider))
def test_the_minimal_description_lacks_only_a_budget(provider: str) -> None:
    assert violated(provider) == {"no-budget"}


def violated(provider: str = "aws", **changes: Any) -> set[str]:
    """The rules that `document(provider, **changes)` violates."""
    return {each.rule for each in policy.findings(planned(provider, **changes), parse(document(provider, **changes)))}


def put(inputs: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a path such as `a.0.b` in nested data; the value ... deletes the key."""
    *parents, last = path.split(".")
    inner: Any = inputs
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
    if value is ...:
        inner.pop(last)
    elif isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = value


Change = Callable[[Recording], Recording]


def changed(kind: str, path: str, value: Any, where: str = "") -> Change:
    """Change a value in every resource of a kind whose name ends with `where`."""

    def change(recording: Recording) -> Recording:
        resources = [
            _with(each, path, value) if each.kind == kind and each.name.endswith(where) else each
            for each in recording.resources
        ]
        assert resources != list(recording.resources), "the change has no effect"
        return replace(recording, resources=tuple(resources))

    return change


def _with(resource: Resource, path: str, value: Any) -> Resource:
    inputs = copy.deepcopy(resource.inputs)
    put(inputs, path, value)
    return replace(resource, inputs=inputs)


def without(kind: str, where: str = "") -> Change:
    def change(recording: Recording) -> Recording:
        kept = tuple(each for each in recording.resources if each.kind != kind or not each.name.endswith(where))
        assert len(kept) < len(recording.resources)
        return replace(recording, resources=kept)

    return change


def added(type_: str, inputs: dict[str, Any]) -> Change:
    return lambda recording: replace(
        recording, resources=(*recording.resources, Resource("added", type_, None, inputs))
    )


def options(kind: str, **values: Any) -> Change:
    return lambda recording: replace(
        recording,
        resources=tuple(replace(each, **values) if each.kind == kind else each for each in recording.resources),
    )


TEMPLATE = "aws.ec2.LaunchTemplate"
FROM_ANYWHERE = {"type": "ingress", "cidrBlocks": ["0.0.0.0/0"], "fromPort": 8265, "toPort": 8265, "protocol": "tcp"}
SINGLE_RULE = {"cidrIpv6": "::/0", "fromPort": 22, "toPort": 22}
FIREWALL = {"sourceRanges": ["0.0.0.0/0"], "allows": [{"protocol": "tcp", "ports": ["22"]}]}
INBOUND = {"sourceAddressPrefix": "*", "direction": "Inbound", "access": "Allow", "destinationPortRange": "22"}
ALL_ACTIONS = json.dumps({"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]})
FROM_ANYWHERE_IPV6 = {"ipv6CidrBlocks": ["::/0"], "fromPort": 22, "toPort": 22, "protocol": "tcp"}
INBOUND_LISTS = {
    "sourceAddressPrefixes": ["10.0.0.0/8", "*"],
    "direction": "Inbound",
    "access": "Allow",
    "destinationPortRanges": ["443", "8265"],
}
NOT_ACTION = json.dumps({"Statement": [{"Effect": "Allow", "NotAction": ["iam:*"], "Resource": "*"}]})
ALL_RESOURCES = json.dumps({"Statement": [{"Effect": "Allow", "Action": ["ec2:RunInstances"], "Resource": ["*"]}]})
NODES = "gcp.container.NodePool"

SERVICE = "kubernetes.ray.io.RayService"
RAY = "spec.rayClusterConfig"
TOKEN = json.dumps({"users": [{"user": {"token": "x"}}]})

MUTATIONS: list[tuple[str, str, Change]] = [
    ("api-open-to-the-world", "aws", changed(EKS, "vpcConfig.publicAccessCidrs", ["0.0.0.0/0"])),
    (
        "api-open-to-the-world",
        "gcp",
        changed(GKE, "masterAuthorizedNetworksConfig.cidrBlocks", [{"cidrBlock": "0.0.0.0/0"}]),
    ),
    ("api-open-to-the-world", "azure", changed(AKS, "apiServerAccessProfile.authorizedIPRanges", ["0.0.0.0/1"])),
    ("api-public-without-list", "aws", changed(EKS, "vpcConfig.endpointPublicAccess", True)),
    ("api-public-without-list", "gcp", changed(GKE, "privateClusterConfig.enablePrivateEndpoint", False)),
    ("api-public-without-list", "azure", changed(AKS, "apiServerAccessProfile.enablePrivateCluster", False)),
    ("world-may-come-in", "aws", added("aws:ec2/securityGroup:SecurityGroup", {"ingress": [FROM_ANYWHERE]})),
    ("world-may-come-in", "gcp", added("gcp:compute/firewall:Firewall", FIREWALL)),
    ("world-may-come-in", "azure", added("azure-native:network:NetworkSecurityGroup", {"securityRules": [INBOUND]})),
    ("world-may-come-in", "aws", added("aws:ec2/securityGroup:SecurityGroup", {"ingress": [FROM_ANYWHERE_IPV6]})),
    ("world-may-come-in", "aws", added("aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule", SINGLE_RULE)),
    ("world-may-come-in", "aws", added("aws:ec2/securityGroupRule:SecurityGroupRule", FROM_ANYWHERE)),
    ("world-may-come-in", "azure", added("azure-native:network:SecurityRule", INBOUND_LISTS)),
    ("node-has-public-address", "aws", changed(TEMPLATE, "networkInterfaces", [{"associatePublicIpAddress": "true"}])),
    ("node-has-public-address", "azure", changed(AKS, "agentPoolProfiles.0.enableNodePublicIP", True)),
    ("node-has-public-address", "aws", changed("aws.ec2.Subnet", "mapPublicIpOnLaunch", True)),
    ("node-has-public-address", "gcp", changed(GKE, "privateClusterConfig.enablePrivateNodes", False)),
    ("node-has-public-address", "azure", changed(POOL, "enableNodePublicIP", True)),
    ("nodes-on-public-subnet", "aws", changed("aws.eks.NodeGroup", "subnetIds", ["${serve-app-public-us-west-2a.id}"])),
    ("ssh-into-nodes", "aws", changed("aws.eks.NodeGroup", "remoteAccess", {"ec2SshKey": "mine"})),
    ("ssh-into-nodes", "aws", changed(TEMPLATE, "keyName", "mine")),
    ("ssh-into-nodes", "azure", changed(AKS, "linuxProfile", {"adminUsername": "me"})),
    ("disk-not-encrypted", "aws", changed(TEMPLATE, "blockDeviceMappings.0.ebs.encrypted", "false")),
    ("disk-not-encrypted", "azure", changed(POOL, "enableEncryptionAtHost", False)),
    ("disk-not-encrypted", "azure", changed(AKS, "agentPoolProfiles.0.enableEncryptionAtHost", ...)),
    ("secrets-not-encrypted", "aws", changed(EKS, "encryptionConfig", ...)),
    ("key-not-rotated", "aws", changed("aws.kms.Key", "enableKeyRotation", False)),
    ("key-deleted-at-once", "aws", changed("aws.kms.Key", "deletionWindowInDays", 7)),
    ("metadata-without-token", "aws", changed(TEMPLATE, "metadataOptions.httpTokens", "optional")),
    ("metadata-reached-by-pods", "aws", changed(TEMPLATE, "metadataOptions.httpPutResponseHopLimit", 2)),
    ("metadata-open-on-gke", "gcp", changed(NODES, "nodeConfig.workloadMetadataConfig.mode", "GCE_METADATA")),
    ("metadata-open-on-gke", "gcp", changed(NODES, "nodeConfig.metadata", {})),
    ("access-by-config-map", "aws", changed(EKS, "accessConfig.authenticationMode", "API_AND_CONFIG_MAP")),
    ("passwords-and-certificates", "azure", changed(AKS, "disableLocalAccounts", False)),
    ("passwords-and-certificates", "azure", changed(AKS, "servicePrincipalProfile", {"clientId": "a", "secret": "b"})),
    (
        "passwords-and-certificates",
        "azure",
        changed("azure-native.containerregistry.Registry", "adminUserEnabled", True),
    ),
    (
        "passwords-and-certificates",
        "gcp",
        changed(GKE, "masterAuth.clientCertificateConfig.issueClientCertificate", True),
    ),
    ("registry-open", "azure", changed("azure-native.containerregistry.Registry", "anonymousPullEnabled", True)),
    ("registry-open", "gcp", changed("gcp.projects.IAMMember", "member", "allUsers")),
    ("rbac-off", "azure", changed(AKS, "enableRBAC", False)),
    ("rbac-off", "gcp", changed(GKE, "enableLegacyAbac", True)),
    ("pods-without-identity", "aws", without("aws.eks.Addon", "eks-pod-identity-agent")),
    ("pods-without-identity", "gcp", changed(GKE, "workloadIdentityConfig", ...)),
    ("pods-without-identity", "azure", changed(AKS, "oidcIssuerProfile.enabled", False)),
    (
        "rights-of-an-administrator",
        "aws",
        changed("aws.iam.RolePolicyAttachment", "policyArn", "arn:aws:iam::aws:policy/AmazonEC2FullAccess"),
    ),
    ("rights-of-an-administrator", "gcp", changed("gcp.projects.IAMMember", "role", "roles/editor")),
    (
        "rights-of-an-administrator",
        "azure",
        changed(
            "azure-native.authorization.RoleAssignment",
            "roleDefinitionId",
            "/subscriptions/x/providers/Microsoft.Authorization/roleDefinitions/b24988ac-6180-42a0-ab88-20f7382dd24c",
        ),
    ),
    ("policy-allows-everything", "aws", changed("aws.iam.RolePolicy", "policy", ALL_ACTIONS)),
    ("policy-allows-everything", "aws", changed("aws.iam.RolePolicy", "policy", ALL_RESOURCES)),
    ("policy-allows-everything", "aws", changed("aws.iam.RolePolicy", "policy", NOT_ACTION)),
    ("nodes-are-default-account", "gcp", changed(NODES, "nodeConfig.serviceAccount", ...)),
    ("node-not-shielded", "gcp", changed(NODES, "nodeConfig.shieldedInstanceConfig.enableSecureBoot", False)),
    ("node-not-shielded", "gcp", changed(GKE, "enableShieldedNodes", False)),
    ("network-policy-not-enforced", "aws", changed("aws.eks.Addon", "configurationValues", "{}", "vpc-cni")),
    ("network-policy-not-enforced", "gcp", changed(GKE, "datapathProvider", "LEGACY_DATAPATH")),
    ("network-policy-not-enforced", "azure", changed(AKS, "networkProfile.networkPolicy", "none")),
    ("run-command-on", "azure", changed(AKS, "apiServerAccessProfile.disableRunCommand", False)),
    ("control-plane-not-logged", "aws", changed(EKS, "enabledClusterLogTypes", ["api"])),
    ("control-plane-not-logged", "gcp", changed(GKE, "loggingConfig.enableComponents", ["SYSTEM_COMPONENTS"])),
    ("control-plane-not-logged", "azure", without("azure-native.monitor.DiagnosticSetting")),
    ("logs-kept-for-ever", "aws", changed("aws.cloudwatch.LogGroup", "retentionInDays", 0)),
    ("logs-kept-for-ever", "azure", changed("azure-native.operationalinsights.Workspace", "retentionInDays", ...)),
    ("image-changes-under-its-tag", "aws", changed("aws.ecr.Repository", "imageTagMutability", "MUTABLE")),
    ("image-changes-under-its-tag", "gcp", changed("gcp.artifactregistry.Repository", "dockerConfig", ...)),
    ("image-not-scanned", "aws", changed("aws.ecr.Repository", "imageScanningConfiguration.scanOnPush", False)),
    ("tags-missing", "aws", changed("aws.eks.NodeGroup", "tags", {})),
    ("tags-missing", "gcp", changed(NODES, "nodeConfig.resourceLabels", ...)),
    ("tags-missing", "azure", changed(POOL, "tags", {"app": "serve-app"})),
    ("spot-for-the-head", "aws", changed("aws.eks.NodeGroup", "capacityType", "SPOT", "system")),
    ("spot-for-the-head", "gcp", changed(NODES, "nodeConfig.spot", True, "system")),
    ("spot-for-the-head", "azure", changed(AKS, "agentPoolProfiles.0.scaleSetPriority", "Spot")),
    ("gpu-without-taint", "aws", changed("aws.eks.NodeGroup", "taints", [], "more")),
    ("gpu-without-taint", "azure", changed(POOL, "nodeTaints", [])),
    ("taint-twice-on-gke", "gcp", changed(NODES, "nodeConfig.taints", [{"key": "nvidia.com/gpu"}], "more")),
    ("update-fights-the-autoscaler", "aws", options("aws.eks.NodeGroup", ignore_changes=())),
    ("update-fights-the-autoscaler", "gcp", options(NODES, ignore_changes=("initialNodeCount",))),
    ("update-fights-the-autoscaler", "azure", options(POOL, ignore_changes=())),
    ("never-scales-from-zero", "aws", without("aws.autoscaling.Tag", "more-tag-resources.nvidia.com.gpu")),
    ("gpu-ami-on-cpu-or-none-on-gpu", "aws", changed("aws.eks.NodeGroup", "amiType", "AL2_x86_64_GPU", "more")),
    (
        "gpu-ami-on-cpu-or-none-on-gpu",
        "gcp",
        changed(NODES, "nodeConfig.guestAccelerators.0.gpuDriverInstallationConfig", ..., "more"),
    ),
    ("gpu-ami-on-cpu-or-none-on-gpu", "azure", changed(POOL, "gpuProfile.driver", "None")),
    ("extended-support", "aws", changed(EKS, "upgradePolicy.supportType", "EXTENDED")),
    ("no-budget", "aws", without("aws.budgets.Budget")),
    ("no-budget", "gcp", without("gcp.billing.Budget")),
    ("no-budget", "azure", without("azure-native.consumption.Budget")),
    ("budget-tells-nobody", "aws", changed("aws.budgets.Budget", "notifications", [])),
    ("budget-tells-nobody", "azure", changed("azure-native.consumption.Budget", "notifications", {})),
    ("production-can-be-deleted", "aws", options(EKS, protect=False)),
    ("production-can-be-deleted", "gcp", changed(GKE, "deletionProtection", False)),
    ("production-can-be-deleted", "azure", without("azure-native.authorization.ManagementLockByScope")),
    ("production-behind-one-nat", "aws", without("aws.ec2.NatGateway", "us-west-2b")),
    ("ray-dashboard-public", "aws", changed(SERVICE, f"{RAY}.headGroupSpec.serviceType", "LoadBalancer")),
    ("ray-dashboard-public", "gcp", changed(SERVICE, f"{RAY}.headGroupSpec.enableIngress", True)),
    ("ray-without-token", "azure", changed(SERVICE, f"{RAY}.authOptions", ...)),
    ("ray-reached-by-every-pod", "aws", without("kubernetes.networking.k8s.io.NetworkPolicy", "default-deny")),
    ("service-outside-the-cluster", "gcp", changed("kubernetes.core.Service", "spec.type", "LoadBalancer")),
    ("secret-in-the-state", "aws", added("kubernetes:core/v1:Secret", {"stringData": {"password": "x"}})),
    ("secret-in-the-state", "azure", changed("pulumi.providers.kubernetes", "kubeconfig", TOKEN)),
]


@pytest.mark.parametrize(
    ("rule", "provider", "change"), MUTATIONS, ids=[f"{rule}-{cloud}" for rule, cloud, _ in MUTATIONS]
)
def test_each_rule_finds_its_fault(rule: str, provider: str, change: Change) -> None:
    found = policy.findings(change(recorded(provider)), full(provider))
    assert rule in {each.rule for each in found}
    assert all(each.message and each.remedy for each in found)


def test_rules_about_the_description_find_their_faults() -> None:
    production = {"production": True, "protect": True}
    assert "production-in-one-zone" in violated("gcp", zones=["us-central1-a"], **production)
    assert "production-all-on-spot" in violated("gcp", pool={"spot": True}, **production)


def test_every_rule_has_a_test_a_reason_and_a_remedy() -> None:
    names = [rule.name for rule in policy.rules()]
    assert len(names) == len(set(names)) >= 30
    assert set(names) == {rule for rule, _, _ in MUTATIONS} | {"production-in-one-zone", "production-all-on-spot"}
    assert all(rule.why and rule.remedy for rule in policy.rules())


def test_the_clusters_name_does_not_affect_the_rules() -> None:
    assert violated(name="serve-public-a") == {"no-budget"}


@pytest.mark.parametrize("provider", get_args(Provider))
def test_a_list_of_api_addresses_is_not_a_fault(provider: str) -> None:
    assert violated(provider, network={"api_cidrs": ["203.0.113.0/24"]}) == {"no-budget"}


def test_errors_come_before_warnings() -> None:
    faulty = changed("aws.kms.Key", "enableKeyRotation", False)(without("aws.budgets.Budget")(recorded("aws")))
    assert [each.severity for each in policy.findings(faulty, full("aws"))] == ["error", "warning"]
