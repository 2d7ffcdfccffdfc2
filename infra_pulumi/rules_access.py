"""Policy rules about network access and about the rights of nodes and pods."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator

from infra_pulumi.policy import COMPONENT_REMEDY, Violations, get, inline_pools, resources_of, rule, value_rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

ANYWHERE = {"0.0.0.0/0", "::/0", "*", "Internet", "Any"}


def _wide(cidr: str) -> bool:
    """Whether a range is wider than /8. Addresses not known yet, `${...}`, belong to the cluster."""
    return not cidr.startswith("${") and ipaddress.ip_network(cidr).prefixlen < 8


@rule("api-open-to-the-world", "error", "list the administrators' addresses in network.api_cidrs")
def _api_is_not_open(recording: Recording, spec: ClusterSpec) -> Violations:
    """Anyone who can reach the Kubernetes API can exploit its vulnerabilities."""
    lists = {
        "aws.eks.Cluster": "vpcConfig.publicAccessCidrs",
        "azure-native.containerservice.ManagedCluster": "apiServerAccessProfile.authorizedIPRanges",
    }
    for kind, path in lists.items():
        for resource in recording.of(kind):
            for cidr in get(resource.inputs, path) or []:
                if _wide(cidr):
                    yield resource.name, f"{path} contains {cidr}"
    for resource in recording.of("gcp.container.Cluster"):
        for block in get(resource.inputs, "masterAuthorizedNetworksConfig.cidrBlocks") or []:
            if _wide(block["cidrBlock"]):
                yield resource.name, f"masterAuthorizedNetworksConfig contains {block['cidrBlock']}"


@rule("api-public-without-list", "error", "set network.api_cidrs, or keep the API private")
def _public_api_has_a_list(recording: Recording, spec: ClusterSpec) -> Violations:
    """A public endpoint without a list of allowed addresses is open to the internet."""
    for resource in recording.of("aws.eks.Cluster"):
        config = resource.inputs.get("vpcConfig", {})
        if config.get("endpointPublicAccess") is not False and not config.get("publicAccessCidrs"):
            yield resource.name, "endpointPublicAccess is on without publicAccessCidrs"
    for resource in recording.of("gcp.container.Cluster"):
        private = get(resource.inputs, "privateClusterConfig.enablePrivateEndpoint")
        if not private and not get(resource.inputs, "masterAuthorizedNetworksConfig.cidrBlocks"):
            yield resource.name, "the endpoint is public without masterAuthorizedNetworksConfig.cidrBlocks"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        access = resource.inputs.get("apiServerAccessProfile", {})
        if not access.get("enablePrivateCluster") and not access.get("authorizedIPRanges"):
            yield resource.name, "the API server is public without authorizedIPRanges"


def _open_ports(recording: Recording) -> Iterator[tuple[str, str]]:
    """Each firewall rule that allows all addresses, as (resource name, ports)."""
    yield from _aws_open_ports(recording)
    for resource in recording.of("gcp.compute.Firewall"):
        if ANYWHERE & set(resource.inputs.get("sourceRanges", [])):
            ports = [port for allow in resource.inputs.get("allows", []) for port in allow.get("ports", ["all"])]
            yield resource.name, ", ".join(ports)
    rules = [(each.name, each.inputs) for each in recording.of("azure-native.network.SecurityRule")]
    for resource in recording.of("azure-native.network.NetworkSecurityGroup"):
        rules += [(resource.name, each) for each in resource.inputs.get("securityRules", [])]
    for name, each in rules:
        sources = {each.get("sourceAddressPrefix"), *each.get("sourceAddressPrefixes", [])}
        if sources & ANYWHERE and (each.get("direction"), each.get("access")) == ("Inbound", "Allow"):
            ports = [each.get("destinationPortRange"), *each.get("destinationPortRanges", [])]
            yield name, ", ".join(filter(None, ports))


def _aws_open_ports(recording: Recording) -> Iterator[tuple[str, str]]:
    rules = [(each.name, each.inputs) for each in recording.of("aws.vpc.SecurityGroupIngressRule")]
    rules += [
        (each.name, each.inputs)
        for each in recording.of("aws.ec2.SecurityGroupRule")
        if each.inputs.get("type") == "ingress"
    ]
    for resource in resources_of(recording, {"aws.ec2.SecurityGroup", "aws.ec2.DefaultSecurityGroup"}):
        rules += [(resource.name, each) for each in resource.inputs.get("ingress", [])]
    for name, each in rules:
        sources = {each.get("cidrIpv4"), each.get("cidrIpv6"), *each.get("cidrBlocks", [])}
        if ANYWHERE & (sources | set(each.get("ipv6CidrBlocks", []))):
            first, last = each.get("fromPort"), each.get("toPort")
            yield name, str(first) if first == last and first is not None else f"{first} to {last}"


@rule("world-may-come-in", "error", "allow only port 443, or only the addresses that need access")
def _only_https_from_everywhere(recording: Recording, spec: ClusterSpec) -> Violations:
    """The internet may reach only port 443, never SSH or Ray's dashboard, which executes code for its callers."""
    for name, ports in _open_ports(recording):
        if ports != "443":
            yield name, f"ports {ports} are open to all addresses"


@rule("node-has-public-address", "error", COMPONENT_REMEDY)
def _nodes_are_private(recording: Recording, spec: ClusterSpec) -> Violations:
    """A node without a public address cannot be attacked from the internet."""
    for resource in recording.of("aws.ec2.Subnet"):
        if resource.inputs.get("mapPublicIpOnLaunch"):
            yield resource.name, "mapPublicIpOnLaunch gives every node a public address"
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
            yield resource.name, "networkInterfaces contains associatePublicIpAddress"


@rule("nodes-on-public-subnet", "error", COMPONENT_REMEDY)
def _nodes_are_on_private_subnets(recording: Recording, spec: ClusterSpec) -> Violations:
    """Public subnets are for load balancers and NAT gateways."""
    subnets = recording.of("aws.ec2.Subnet")
    public = {f"${{{each.name}.id}}" for each in subnets if "kubernetes.io/role/elb" in each.inputs.get("tags", {})}
    for resource in recording.of("aws.eks.NodeGroup"):
        if used := sorted(public & set(resource.inputs.get("subnetIds", []))):
            yield resource.name, f"subnetIds contains public subnets: {', '.join(used)}"


@rule("ssh-into-nodes", "error", "use kubectl debug or AWS Systems Manager")
def _no_ssh(recording: Recording, spec: ClusterSpec) -> Violations:
    """A node group with an SSH key and without a source group opens port 22 to the internet (pulumi-aws docs)."""
    for resource in recording.of("aws.eks.NodeGroup"):
        if resource.inputs.get("remoteAccess"):
            yield resource.name, "remoteAccess is set"
    for resource in recording.of("aws.ec2.LaunchTemplate"):
        if resource.inputs.get("keyName"):
            yield resource.name, "keyName is set"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if resource.inputs.get("linuxProfile"):
            yield resource.name, "linuxProfile is set, which contains an SSH key"


value_rule(
    "metadata-without-token",
    "error",
    "aws.ec2.LaunchTemplate",
    "metadataOptions.httpTokens",
    "required",
    "Without a token, one forged request can read the node's credentials.",
    COMPONENT_REMEDY,
)
value_rule(
    "metadata-reached-by-pods",
    "error",
    "aws.ec2.LaunchTemplate",
    "metadataOptions.httpPutResponseHopLimit",
    1,
    "With more than one hop, every pod can use the node's rights.",
    COMPONENT_REMEDY,
)


@rule("metadata-open-on-gke", "error", COMPONENT_REMEDY)
def _gke_metadata(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without GKE's metadata server, every pod can use the node's rights."""
    for resource in recording.of("gcp.container.NodePool"):
        if get(resource.inputs, "nodeConfig.workloadMetadataConfig.mode") != "GKE_METADATA":
            yield resource.name, "workloadMetadataConfig.mode is not GKE_METADATA"
        if get(resource.inputs, "nodeConfig.metadata.disable-legacy-endpoints") != "true":
            yield resource.name, "metadata.disable-legacy-endpoints is not true"


@rule("access-by-config-map", "error", COMPONENT_REMEDY)
def _access_entries(recording: Recording, spec: ClusterSpec) -> Violations:
    """AWS logs access entries; one typing error in the config map can remove all access."""
    for resource in recording.of("aws.eks.Cluster"):
        if get(resource.inputs, "accessConfig.authenticationMode") != "API":
            yield resource.name, "accessConfig.authenticationMode is not API"


@rule("passwords-and-certificates", "error", COMPONENT_REMEDY)
def _no_shared_secrets(recording: Recording, spec: ClusterSpec) -> Violations:
    """A shared secret cannot be revoked for one user."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not resource.inputs.get("disableLocalAccounts"):
            yield resource.name, "disableLocalAccounts is not set"
        if resource.inputs.get("servicePrincipalProfile"):
            yield resource.name, "servicePrincipalProfile contains a secret; use a managed identity"
    for resource in recording.of("gcp.container.Cluster"):
        if get(resource.inputs, "masterAuth.clientCertificateConfig.issueClientCertificate") is not False:
            yield resource.name, "clientCertificateConfig.issueClientCertificate is not false"
    for resource in recording.of("azure-native.containerregistry.Registry"):
        if resource.inputs.get("adminUserEnabled") is not False:
            yield resource.name, "adminUserEnabled is not false"


@rule("registry-open", "error", COMPONENT_REMEDY)
def _registry_is_private(recording: Recording, spec: ClusterSpec) -> Violations:
    """Images contain the service's code."""
    for resource in recording.of("azure-native.containerregistry.Registry"):
        if resource.inputs.get("anonymousPullEnabled"):
            yield resource.name, "anonymousPullEnabled is set"
    for resource in resources_of(
        recording,
        {"gcp.artifactregistry.RepositoryIamMember", "gcp.projects.IAMMember", "gcp.serviceaccount.IAMMember"},
    ):
        if resource.inputs.get("member") in ("allUsers", "allAuthenticatedUsers"):
            yield resource.name, f"{resource.inputs['member']} has {resource.inputs['role']}"


@rule("rbac-off", "error", COMPONENT_REMEDY)
def _rbac(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without role-based access control, every user has all rights."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not resource.inputs.get("enableRBAC") or not get(resource.inputs, "aadProfile.enableAzureRBAC"):
            yield resource.name, "enableRBAC and aadProfile.enableAzureRBAC are not both set"
    for resource in recording.of("gcp.container.Cluster"):
        if resource.inputs.get("enableLegacyAbac"):
            yield resource.name, "enableLegacyAbac is set"


@rule("pods-without-identity", "error", COMPONENT_REMEDY)
def _workload_identity(recording: Recording, spec: ClusterSpec) -> Violations:
    """Pods with a cloud identity need no copied keys."""
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


@rule("rights-of-an-administrator", "error", "grant only the required rights")
def _least_privilege(recording: Recording, spec: ClusterSpec) -> Violations:
    """An attacker who controls a node has all rights of the node's role."""
    for resource in recording.of("aws.iam.RolePolicyAttachment"):
        if _ADMIN.search(resource.inputs.get("policyArn", "")):
            yield resource.name, f"{resource.inputs['policyArn']} is attached"
    for resource in recording.of("gcp.projects.IAMMember"):
        if _ADMIN.search(resource.inputs.get("role", "")):
            yield resource.name, f"{resource.inputs['role']} is granted"
    for resource in recording.of("azure-native.authorization.RoleAssignment"):
        if resource.inputs.get("roleDefinitionId", "").endswith(_AZURE_ADMIN):
            yield resource.name, "Owner, Contributor or User Access Administrator is granted"


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@rule("policy-allows-everything", "error", "list the actions and restrict the resources")
def _no_wildcards(recording: Recording, spec: ClusterSpec) -> Violations:
    """An action that changes resources must be limited to this cluster's resources."""
    for resource in recording.of("aws.iam.RolePolicy"):
        for statement in json.loads(resource.inputs["policy"])["Statement"]:
            actions = _as_list(statement.get("Action", "*"))  # without Action there is NotAction: all actions but some
            changing = [each for each in actions if not re.match(r"[\w-]+:(Describe|Get|List)", each)]
            if any(each == "*" or each.endswith(":*") for each in actions):
                yield resource.name, f"{', '.join(actions)} is allowed"
            elif changing and "*" in _as_list(statement.get("Resource", "*")) and "Condition" not in statement:
                yield resource.name, f"{', '.join(changing)} is allowed on all resources"


@rule("nodes-are-default-account", "error", COMPONENT_REMEDY)
def _own_account(recording: Recording, spec: ClusterSpec) -> Violations:
    """Compute Engine's default account can edit the whole project."""
    for resource in recording.of("gcp.container.NodePool"):
        if not (get(resource.inputs, "nodeConfig.serviceAccount") or "").startswith(f"{spec.name}-"):
            yield resource.name, "nodeConfig.serviceAccount is not the cluster's own account"


@rule("node-not-shielded", "error", COMPONENT_REMEDY)
def _shielded(recording: Recording, spec: ClusterSpec) -> Violations:
    """Secure boot and integrity monitoring detect a changed kernel."""
    for resource in recording.of("gcp.container.Cluster"):
        if not resource.inputs.get("enableShieldedNodes"):
            yield resource.name, "enableShieldedNodes is not set"
    for resource in recording.of("gcp.container.NodePool"):
        config = get(resource.inputs, "nodeConfig.shieldedInstanceConfig") or {}
        if not (config.get("enableSecureBoot") and config.get("enableIntegrityMonitoring")):
            yield resource.name, "shieldedInstanceConfig lacks secure boot or integrity monitoring"


@rule("network-policy-not-enforced", "error", "set addons.network_policy: true")
def _network_policies_enforced(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without enforcement, network policies do not restrict access to Ray's dashboard."""
    for resource in recording.of("aws.eks.Addon"):
        if resource.inputs.get("addonName") == "vpc-cni":
            values = json.loads(resource.inputs.get("configurationValues") or "{}")
            if values.get("enableNetworkPolicy") != "true":
                yield resource.name, "configurationValues does not have enableNetworkPolicy: true"
    for resource in recording.of("gcp.container.Cluster"):
        if resource.inputs.get("datapathProvider") != "ADVANCED_DATAPATH":
            yield resource.name, "datapathProvider is not ADVANCED_DATAPATH"
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if get(resource.inputs, "networkProfile.networkPolicy") not in ("cilium", "calico", "azure"):
            yield resource.name, "networkProfile.networkPolicy is not set"


@rule("run-command-on", "warning", COMPONENT_REMEDY)
def _no_run_command(recording: Recording, spec: ClusterSpec) -> Violations:
    """`az aks command invoke` bypasses the network restrictions of the API."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        if not get(resource.inputs, "apiServerAccessProfile.disableRunCommand"):
            yield resource.name, "apiServerAccessProfile.disableRunCommand is not set"
