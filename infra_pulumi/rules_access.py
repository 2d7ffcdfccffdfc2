"""Rules about who may call in, and what nodes and pods may do."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator

from infra_pulumi.policy import HOUSE, Broken, expected, get, inline_pools, of, rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

EVERYBODY = {"0.0.0.0/0", "::/0", "*", "Internet", "Any"}


def _wide(cidr: str) -> bool:
    """Addresses that are not known yet, `${...}`, are the cluster's own."""
    return not cidr.startswith("${") and ipaddress.ip_network(cidr).prefixlen < 8


@rule("api-open-to-the-world", "error", "name the addresses of those who administer it in network.api_cidrs")
def _api_is_not_open(recording: Recording, spec: ClusterSpec) -> Broken:
    """Whoever reaches the Kubernetes API may try every fault that it will have."""
    lists = {
        "aws.eks.Cluster": "vpcConfig.publicAccessCidrs",
        "azure-native.containerservice.ManagedCluster": "apiServerAccessProfile.authorizedIPRanges",
    }
    for kind, path in lists.items():
        for resource in recording.of(kind):
            for cidr in get(resource.inputs, path) or []:
                if _wide(cidr):
                    yield resource.name, f"{path} has {cidr}"
    for resource in recording.of("gcp.container.Cluster"):
        for block in get(resource.inputs, "masterAuthorizedNetworksConfig.cidrBlocks") or []:
            if _wide(block["cidrBlock"]):
                yield resource.name, f"masterAuthorizedNetworksConfig has {block['cidrBlock']}"


@rule("api-public-without-list", "error", "name network.api_cidrs, or leave the API private")
def _public_api_has_a_list(recording: Recording, spec: ClusterSpec) -> Broken:
    """A public endpoint without a list of callers is open to everybody."""
    for resource in recording.of("aws.eks.Cluster"):
        config = resource.inputs.get("vpcConfig", {})
        if config.get("endpointPublicAccess") is not False and not config.get("publicAccessCidrs"):
            yield resource.name, "endpointPublicAccess without publicAccessCidrs"
    for resource in recording.of("gcp.container.Cluster"):
        private = get(resource.inputs, "privateClusterConfig.enablePrivateEndpoint")
        if not private and not get(resource.inputs, "masterAuthorizedNetworksConfig.cidrBlocks"):
            yield resource.name, "a public endpoint without masterAuthorizedNetworksConfig.cidrBlocks"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        access = resource.inputs.get("apiServerAccessProfile", {})
        if not access.get("enablePrivateCluster") and not access.get("authorizedIPRanges"):
            yield resource.name, "a public API server without authorizedIPRanges"


def _openings(recording: Recording) -> Iterator[tuple[str, str]]:
    """Each way in from everywhere: whose it is, and its ports."""
    yield from _aws_openings(recording)
    for resource in recording.of("gcp.compute.Firewall"):
        if EVERYBODY & set(resource.inputs.get("sourceRanges", [])):
            ports = [port for allow in resource.inputs.get("allows", []) for port in allow.get("ports", ["all"])]
            yield resource.name, ", ".join(ports)
    rules = [(each.name, each.inputs) for each in recording.of("azure-native.network.SecurityRule")]
    for resource in recording.of("azure-native.network.NetworkSecurityGroup"):
        rules += [(resource.name, each) for each in resource.inputs.get("securityRules", [])]
    for name, each in rules:
        sources = {each.get("sourceAddressPrefix"), *each.get("sourceAddressPrefixes", [])}
        if sources & EVERYBODY and (each.get("direction"), each.get("access")) == ("Inbound", "Allow"):
            ports = [each.get("destinationPortRange"), *each.get("destinationPortRanges", [])]
            yield name, ", ".join(filter(None, ports))


def _aws_openings(recording: Recording) -> Iterator[tuple[str, str]]:
    rules = [(each.name, each.inputs) for each in recording.of("aws.vpc.SecurityGroupIngressRule")]
    rules += [
        (each.name, each.inputs)
        for each in recording.of("aws.ec2.SecurityGroupRule")
        if each.inputs.get("type") == "ingress"
    ]
    for resource in of(recording, {"aws.ec2.SecurityGroup", "aws.ec2.DefaultSecurityGroup"}):
        rules += [(resource.name, each) for each in resource.inputs.get("ingress", [])]
    for name, each in rules:
        sources = {each.get("cidrIpv4"), each.get("cidrIpv6"), *each.get("cidrBlocks", [])}
        if EVERYBODY & (sources | set(each.get("ipv6CidrBlocks", []))):
            first, last = each.get("fromPort"), each.get("toPort")
            yield name, str(first) if first == last and first is not None else f"{first} to {last}"


@rule("world-may-come-in", "error", "let in one port, 443, or the addresses that need it")
def _only_https_from_everywhere(recording: Recording, spec: ClusterSpec) -> Broken:
    """From everywhere only 443 may be reached: never SSH, and never Ray's dashboard, which runs anybody's code."""
    for name, ports in _openings(recording):
        if ports != "443":
            yield name, f"ports {ports} are open to everybody"


@rule("node-has-public-address", "error", HOUSE)
def _nodes_are_private(recording: Recording, spec: ClusterSpec) -> Broken:
    """A node that cannot be reached cannot be attacked from outside."""
    for resource in recording.of("aws.ec2.Subnet"):
        if resource.inputs.get("mapPublicIpOnLaunch"):
            yield resource.name, "mapPublicIpOnLaunch gives every machine a public address"
    for resource in recording.of("gcp.container.Cluster"):
        if not get(resource.inputs, "privateClusterConfig.enablePrivateNodes"):
            yield resource.name, "privateClusterConfig.enablePrivateNodes is not set"
    for resource in recording.of("azure-native.containerservice.AgentPool"):
        if resource.inputs.get("enableNodePublicIP") is not False:
            yield resource.name, "enableNodePublicIP is not false"
    for cluster, pool in inline_pools(recording):
        if pool.get("enableNodePublicIP") is not False:
            yield cluster, f"pool {pool.get('name')}: enableNodePublicIP is not false"
    for resource in recording.of("aws.ec2.LaunchTemplate"):
        if any(each.get("associatePublicIpAddress") for each in resource.inputs.get("networkInterfaces", [])):
            yield resource.name, "networkInterfaces has associatePublicIpAddress"


@rule("nodes-on-public-subnet", "error", HOUSE)
def _nodes_are_on_private_subnets(recording: Recording, spec: ClusterSpec) -> Broken:
    """The public subnets are for load balancers and NAT."""
    subnets = recording.of("aws.ec2.Subnet")
    public = {f"${{{each.name}.id}}" for each in subnets if "kubernetes.io/role/elb" in each.inputs.get("tags", {})}
    for resource in recording.of("aws.eks.NodeGroup"):
        if strange := sorted(public & set(resource.inputs.get("subnetIds", []))):
            yield resource.name, f"its nodes would be on {', '.join(strange)}"


@rule("ssh-into-nodes", "error", "use kubectl debug, or AWS Systems Manager")
def _nobody_logs_in(recording: Recording, spec: ClusterSpec) -> Broken:
    """A node group with an SSH key and no source group opens 22 to the world (pulumi-aws's own words)."""
    for resource in recording.of("aws.eks.NodeGroup"):
        if resource.inputs.get("remoteAccess"):
            yield resource.name, "remoteAccess is set"
    for resource in recording.of("aws.ec2.LaunchTemplate"):
        if resource.inputs.get("keyName"):
            yield resource.name, "keyName is set"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if resource.inputs.get("linuxProfile"):
            yield resource.name, "linuxProfile has an SSH key"


expected(
    "metadata-without-token",
    "error",
    "aws.ec2.LaunchTemplate",
    "metadataOptions.httpTokens",
    "required",
    "Without a token one forged request reads the node's credentials.",
    HOUSE,
)
expected(
    "metadata-reached-by-pods",
    "error",
    "aws.ec2.LaunchTemplate",
    "metadataOptions.httpPutResponseHopLimit",
    1,
    "With more than one hop every pod has the node's rights.",
    HOUSE,
)


@rule("metadata-open-on-gke", "error", HOUSE)
def _gke_metadata(recording: Recording, spec: ClusterSpec) -> Broken:
    """Without GKE's metadata server every pod has the node's rights."""
    for resource in recording.of("gcp.container.NodePool"):
        if get(resource.inputs, "nodeConfig.workloadMetadataConfig.mode") != "GKE_METADATA":
            yield resource.name, "workloadMetadataConfig.mode is not GKE_METADATA"
        if get(resource.inputs, "nodeConfig.metadata.disable-legacy-endpoints") != "true":
            yield resource.name, "legacy metadata endpoints are not disabled"


@rule("access-by-config-map", "error", HOUSE)
def _access_entries(recording: Recording, spec: ClusterSpec) -> Broken:
    """Who may do what in a cluster is AWS's to record, not a config map's that one typing error empties."""
    for resource in recording.of("aws.eks.Cluster"):
        if get(resource.inputs, "accessConfig.authenticationMode") != "API":
            yield resource.name, "accessConfig.authenticationMode is not API"


@rule("passwords-and-certificates", "error", HOUSE)
def _no_shared_secrets(recording: Recording, spec: ClusterSpec) -> Broken:
    """What is shared cannot be taken back from one."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not resource.inputs.get("disableLocalAccounts"):
            yield resource.name, "disableLocalAccounts is not set"
        if resource.inputs.get("servicePrincipalProfile"):
            yield resource.name, "servicePrincipalProfile has a secret; use a managed identity"
    for resource in recording.of("gcp.container.Cluster"):
        if get(resource.inputs, "masterAuth.clientCertificateConfig.issueClientCertificate") is not False:
            yield resource.name, "a client certificate is issued"
    for resource in recording.of("azure-native.containerregistry.Registry"):
        if resource.inputs.get("adminUserEnabled") is not False:
            yield resource.name, "adminUserEnabled is not false"


@rule("registry-open", "error", HOUSE)
def _registry_is_private(recording: Recording, spec: ClusterSpec) -> Broken:
    """An image holds the service's code."""
    for resource in recording.of("azure-native.containerregistry.Registry"):
        if resource.inputs.get("anonymousPullEnabled"):
            yield resource.name, "anonymousPullEnabled is set"
    for resource in of(
        recording,
        {"gcp.artifactregistry.RepositoryIamMember", "gcp.projects.IAMMember", "gcp.serviceaccount.IAMMember"},
    ):
        if resource.inputs.get("member") in ("allUsers", "allAuthenticatedUsers"):
            yield resource.name, f"{resource.inputs['role']} is given to {resource.inputs['member']}"


@rule("rbac-off", "error", HOUSE)
def _rbac(recording: Recording, spec: ClusterSpec) -> Broken:
    """Without roles whoever is let in may do everything."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not resource.inputs.get("enableRBAC") or not get(resource.inputs, "aadProfile.enableAzureRBAC"):
            yield resource.name, "enableRBAC and aadProfile.enableAzureRBAC are not both set"
    for resource in recording.of("gcp.container.Cluster"):
        if resource.inputs.get("enableLegacyAbac"):
            yield resource.name, "enableLegacyAbac is set"


@rule("pods-without-identity", "error", HOUSE)
def _workload_identity(recording: Recording, spec: ClusterSpec) -> Broken:
    """Pods that are somebody to the cloud need no keys that are copied around."""
    for resource in recording.of("gcp.container.Cluster"):
        if not get(resource.inputs, "workloadIdentityConfig.workloadPool"):
            yield resource.name, "workloadIdentityConfig is missing"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        profile = "securityProfile.workloadIdentity.enabled"
        if not get(resource.inputs, profile) or not get(resource.inputs, "oidcIssuerProfile.enabled"):
            yield resource.name, "workload identity needs securityProfile.workloadIdentity and oidcIssuerProfile"
    agents = {resource.inputs.get("addonName") for resource in recording.of("aws.eks.Addon")}
    for resource in recording.of("aws.eks.Cluster"):
        if "eks-pod-identity-agent" not in agents:
            yield resource.name, "the add-on eks-pod-identity-agent is missing"


_ADMIN = re.compile(r"AdministratorAccess|PowerUserAccess|FullAccess$|roles/(owner|editor)$")
# Azure's ids of Owner, Contributor and User Access Administrator.
_AZURE_ADMIN = (
    "8e3af657-a8ff-443c-a75c-2fe8c4bcb635",
    "b24988ac-6180-42a0-ab88-20f7382dd24c",
    "18d7d88d-d35e-4fb5-a5c3-7773c20a72d9",
)


@rule("rights-of-an-administrator", "error", "give the rights that are needed, by name")
def _least_privilege(recording: Recording, spec: ClusterSpec) -> Broken:
    """A machine that may do everything does so for whoever takes it over."""
    for resource in recording.of("aws.iam.RolePolicyAttachment"):
        if _ADMIN.search(resource.inputs.get("policyArn", "")):
            yield resource.name, f"{resource.inputs['policyArn']} is attached"
    for resource in recording.of("gcp.projects.IAMMember"):
        if _ADMIN.search(resource.inputs.get("role", "")):
            yield resource.name, f"{resource.inputs['role']} is given"
    for resource in recording.of("azure-native.authorization.RoleAssignment"):
        if resource.inputs.get("roleDefinitionId", "").endswith(_AZURE_ADMIN):
            yield resource.name, "Owner, Contributor or User Access Administrator is given"


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@rule("policy-allows-everything", "error", "name the actions, and whom they concern")
def _no_wildcards(recording: Recording, spec: ClusterSpec) -> Broken:
    """What changes something may do so to this cluster's only."""
    for resource in recording.of("aws.iam.RolePolicy"):
        for statement in json.loads(resource.inputs["policy"])["Statement"]:
            actions = _listed(statement.get("Action", "*"))  # without it there is NotAction: all but some
            changing = [each for each in actions if not re.match(r"[\w-]+:(Describe|Get|List)", each)]
            if any(each == "*" or each.endswith(":*") for each in actions):
                yield resource.name, f"{', '.join(actions)} is allowed"
            elif changing and "*" in _listed(statement.get("Resource", "*")) and "Condition" not in statement:
                yield resource.name, f"{', '.join(changing)} is allowed on everything"


@rule("nodes-are-default-account", "error", HOUSE)
def _own_account(recording: Recording, spec: ClusterSpec) -> Broken:
    """Compute Engine's default account may edit the whole project."""
    for resource in recording.of("gcp.container.NodePool"):
        if not (get(resource.inputs, "nodeConfig.serviceAccount") or "").startswith(f"{spec.name}-"):
            yield resource.name, "nodeConfig.serviceAccount is not one of the cluster's own"


@rule("node-not-shielded", "error", HOUSE)
def _shielded(recording: Recording, spec: ClusterSpec) -> Broken:
    """Secure boot and integrity monitoring notice a changed kernel."""
    for resource in recording.of("gcp.container.Cluster"):
        if not resource.inputs.get("enableShieldedNodes"):
            yield resource.name, "enableShieldedNodes is not set"
    for resource in recording.of("gcp.container.NodePool"):
        config = get(resource.inputs, "nodeConfig.shieldedInstanceConfig") or {}
        if not (config.get("enableSecureBoot") and config.get("enableIntegrityMonitoring")):
            yield resource.name, "shieldedInstanceConfig is not whole"


@rule("network-policy-not-enforced", "error", "set addons.network_policy: true")
def _network_policies_count(recording: Recording, spec: ClusterSpec) -> Broken:
    """A network policy that nobody enforces says that Ray's dashboard is closed, and it is not."""
    for resource in recording.of("aws.eks.Addon"):
        if resource.inputs.get("addonName") == "vpc-cni":
            values = json.loads(resource.inputs.get("configurationValues") or "{}")
            if values.get("enableNetworkPolicy") != "true":
                yield resource.name, "vpc-cni does not have enableNetworkPolicy"
    for resource in recording.of("gcp.container.Cluster"):
        if resource.inputs.get("datapathProvider") != "ADVANCED_DATAPATH":
            yield resource.name, "datapathProvider is not ADVANCED_DATAPATH"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if get(resource.inputs, "networkProfile.networkPolicy") not in ("cilium", "calico", "azure"):
            yield resource.name, "networkProfile.networkPolicy is not set"


@rule("run-command-on", "warning", HOUSE)
def _no_run_command(recording: Recording, spec: ClusterSpec) -> Broken:
    """`az aks command invoke` goes around the network that the API is closed to."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not get(resource.inputs, "apiServerAccessProfile.disableRunCommand"):
            yield resource.name, "apiServerAccessProfile.disableRunCommand is not set"
