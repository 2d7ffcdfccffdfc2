"""The recorded programs of the three clouds: resources, order, values and reproducibility."""

from __future__ import annotations

import importlib
import inspect
import ipaddress
import itertools
import json
import random
import re
import time
from pathlib import Path
from typing import Any, get_args

import botocore.session
import pulumi
import pytest
import yaml

from infra_pulumi import catalogue, program
from infra_pulumi.plan import evaluate
from infra_pulumi.record import PROJECT, Recording, RecordingMonitor, Resource, record
from infra_pulumi.spec import Provider, SpecError, load, parse
from tests.infra.helpers import TYPES, document, full, planned, recorded

pytestmark = pytest.mark.infra

PROVIDERS = get_args(Provider)
GROUPS = {
    "aws": "aws.eks.NodeGroup",
    "gcp": "gcp.container.NodePool",
    "azure": "azure-native.containerservice.AgentPool",
}
SDKS = {"aws": "pulumi_aws", "gcp": "pulumi_gcp", "azure-native": "pulumi_azure_native"}


def inputs_of(recording: Recording, name: str) -> dict[str, Any]:
    """The inputs of the resource with this name."""
    (resource,) = [each for each in recording.resources if each.name == name]
    return resource.inputs


@pytest.mark.parametrize("provider", PROVIDERS)
def test_two_plans_of_a_description_are_equal_byte_by_byte(provider: str) -> None:
    assert evaluate(full(provider)).json() == recorded(provider).json()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_resources_have_a_component_as_parent_and_follow_their_dependencies(provider: str) -> None:
    seen: set[str] = set()
    for resource in recorded(provider).resources:
        assert set(resource.dependencies) <= seen, resource.name
        component = "serve-app-addons" if "kubernetes" in resource.type.split(":") else "serve-app"
        assert resource.parent == (component if resource.custom else None)
        seen.add(resource.name)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_cloud_has_the_same_outputs(provider: str) -> None:
    outputs = recorded(provider).outputs
    assert set(outputs) == {
        "cluster_name",
        "endpoint",
        "identity",
        "kubeconfig_command",
        "node_groups",
        "registry",
    }
    assert all(outputs.values())
    assert len(outputs["node_groups"]) == 4  # the system pool, two groups of the first pool, one of the second


def required(resource: Resource) -> set[str]:
    """The required properties of a resource, from the source of its SDK class."""
    package, module, name = resource.type.split(":")
    resource_class = getattr(importlib.import_module(f"{SDKS[package]}.{module.partition('/')[0]}"), name)
    return set(re.findall(r"Missing required property '(\w+)'", inspect.getsource(resource_class._internal_init)))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_required_property_is_in_the_plan(provider: str) -> None:
    """An output without a placeholder is None, and Pulumi drops None values silently."""
    for resource in recorded(provider).resources:
        if resource.type.split(":")[0] in SDKS:
            camel = {re.sub(r"_(\w)", lambda match: match[1].upper(), key).rstrip("_") for key in required(resource)}
            assert camel <= set(resource.inputs), resource.name


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_placeholder_is_empty(provider: str) -> None:
    assert re.findall(r"None|\$\{\}|\$\{[^}]*\$", recorded(provider).json()) == []


MACHINES = [machine for machine in catalogue.load().instance_types if machine.gpu and not machine.refused]
VARIANTS = list(itertools.product((False, True), (0, 1)))  # spot, min
MATRIX = list(itertools.product(MACHINES, VARIANTS))
# Every machine once, with the variants in turn.
SAMPLE = list(zip(MACHINES, itertools.cycle(VARIANTS), strict=False))


@pytest.mark.parametrize("cases", [SAMPLE, pytest.param(MATRIX, marks=pytest.mark.long)], ids=["sample", "all"])
def test_every_machine_is_planned_with_and_without_spot_and_from_zero_or_one(cases: list[Any]) -> None:
    assert len(MACHINES) >= 24
    start = time.process_time()
    for machine, (spot, minimum) in cases:
        pool = {"instance_types": [machine.type], "spot": spot, "min": minimum, "max": 3}
        group = inputs_of(evaluate(parse(document(machine.provider, pool=pool))), "serve-app-pool-gpu")
        assert pool_facts(machine.provider, group) == (spot, minimum, 3, machine.type.partition("+")[0])
    assert time.process_time() - start < 60


def pool_facts(provider: str, group: dict[str, Any]) -> tuple[bool, int, int, str]:
    """Spot, minimum, maximum and machine type of a pool, from each cloud's inputs."""
    match provider:
        case "aws":
            scaling = group["scalingConfig"]
            (machine,) = group["instanceTypes"]
            return group["capacityType"] == "SPOT", scaling["minSize"], scaling["maxSize"], machine
        case "gcp":
            scaling, config = group["autoscaling"], group["nodeConfig"]
            return config["spot"], scaling["totalMinNodeCount"], scaling["totalMaxNodeCount"], config["machineType"]
        case _:
            return group["scaleSetPriority"] == "Spot", group["minCount"], group["maxCount"], group["vmSize"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_both_node_groups_of_a_pool_have_the_same_pool_label(provider: str) -> None:
    key = {"aws": "labels", "gcp": "nodeConfig", "azure": "nodeLabels"}[provider]
    labels = [inputs_of(recorded(provider), f"serve-app-pool-{name}")[key] for name in ("gpuod", "gpusp")]
    if provider == "gcp":
        labels = [each["labels"] for each in labels]
    assert [each["serve-app/pool"] for each in labels] == ["gpu", "gpu"]
    assert [each["serve-app/capacity"] for each in labels] == ["on-demand", "spot"]


def test_aws_auto_scaling_groups_have_the_tags_for_scaling_from_zero() -> None:
    tags = {
        tag.inputs["tag"]["key"].partition("node-template/")[2]: tag.inputs["tag"]
        for tag in recorded("aws").of("aws.autoscaling.Tag")
        if tag.inputs["autoscalingGroupName"] == "${serve-app-pool-more.autoscalingGroup}"
    }
    assert {key: tag["value"] for key, tag in tags.items()} == {
        "label/k8s.amazonaws.com/accelerator": "a10g",
        "label/serve-app/accelerator": "a10g",
        "label/serve-app/capacity": "on-demand",
        "label/serve-app/pool": "more",
        "resources/ephemeral-storage": "200Gi",
        "resources/nvidia.com/gpu": "1",
        "taint/nvidia.com/gpu": "present:NoSchedule",
        "taint/team": "a:NoSchedule",
    }
    assert not any(tag["propagateAtLaunch"] for tag in tags.values())


def test_a_gke_gpu_pool_follows_the_system_pool_and_has_no_second_gpu_taint() -> None:
    (pool,) = [each for each in recorded("gcp").resources if each.name == "serve-app-pool-more"]
    assert "serve-app-system" in pool.dependencies
    assert pool.inputs["nodeConfig"]["taints"] == [{"effect": "NO_SCHEDULE", "key": "team", "value": "a"}]


@pytest.mark.parametrize(
    ("machine", "accelerator", "count"),
    [
        ("n1-standard-4+t4", "nvidia-tesla-t4", 1),
        ("g2-standard-4", "nvidia-l4", 1),
        ("a2-highgpu-2g", "nvidia-tesla-a100", 2),
        ("a2-ultragpu-1g", "nvidia-a100-80gb", 1),
    ],
)
def test_gke_pools_have_googles_names_of_gpus(machine: str, accelerator: str, count: int) -> None:
    pool = inputs_of(planned("gcp", pool={"instance_types": [machine]}), "serve-app-pool-gpu")
    (found,) = pool["nodeConfig"]["guestAccelerators"]
    assert (found["type"], found["count"]) == (accelerator, count)


@pytest.mark.parametrize("zones", [2, 3, 6])
@pytest.mark.parametrize("cidr", ["10.40.0.0/16", "192.168.0.0/20"])
def test_aws_subnets_do_not_overlap_and_are_inside_the_range(zones: int, cidr: str) -> None:
    names = [f"us-east-1{letter}" for letter in "abcdef"[:zones]]
    recording = planned(region="us-east-1", zones=names, network={"cidr": cidr})
    blocks = [ipaddress.IPv4Network(each.inputs["cidrBlock"]) for each in recording.of("aws.ec2.Subnet")]
    assert len(blocks) == 2 * zones
    assert all(block.subnet_of(ipaddress.IPv4Network(cidr)) for block in blocks)
    assert not any(block.overlaps(other) for block, other in itertools.combinations(blocks, 2))


@pytest.mark.parametrize(("nat", "gateways"), [("one", 1), ("per-zone", 2)])
def test_each_zone_has_a_route_to_a_nat_gateway(nat: str, gateways: int) -> None:
    recording = planned(network={"nat": nat})
    assert len(recording.of("aws.ec2.NatGateway")) == gateways
    private = [each for each in recording.of("aws.ec2.Route") if "natGatewayId" in each.inputs]
    assert len({each.inputs["natGatewayId"] for each in private}) == gateways
    assert len(private) == 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_api_cidrs_the_api_is_private(provider: str) -> None:
    private, listed = (
        inputs_of(planned(provider, network={"api_cidrs": cidrs}), "serve-app-cluster")
        for cidrs in ([], ["203.0.113.0/24"])
    )
    match provider:
        case "aws":
            assert private["vpcConfig"]["endpointPublicAccess"] is False
            assert listed["vpcConfig"]["publicAccessCidrs"] == ["203.0.113.0/24"]
        case "gcp":
            assert private["privateClusterConfig"]["enablePrivateEndpoint"] is True
            blocks = listed["masterAuthorizedNetworksConfig"]["cidrBlocks"]
            assert blocks == [{"cidrBlock": "203.0.113.0/24"}]
        case _:
            assert private["apiServerAccessProfile"]["enablePrivateCluster"] is True
            assert listed["apiServerAccessProfile"]["authorizedIPRanges"] == [
                "203.0.113.0/24",
                "${serve-app-nat-ip.ipAddress}/32",
            ], "the nodes reach the API through NAT"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_protect_protects_the_cluster(provider: str) -> None:
    protected = {each.kind for each in recorded(provider).resources if each.protect}
    assert {"aws": "aws.eks.Cluster", "gcp": "gcp.container.Cluster"}.get(
        provider, "azure-native.containerservice.ManagedCluster"
    ) in protected
    assert not any(each.protect for each in planned(provider).resources)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_program_for_pulumis_cli_creates_the_planned_resources(provider: str) -> None:
    """`pulumi up` runs this program with the description from the stack's settings."""
    folder = Path(program.__file__).parent
    config = yaml.safe_load((folder / f"Pulumi.{provider}.yaml").read_text())["config"]
    computed_outputs = importlib.import_module(f"infra_pulumi.{provider}").computed_outputs

    def run() -> None:
        pulumi.runtime.set_all_config(config)
        program.main()

    recording = record(run, "serve-app", RecordingMonitor(computed_outputs))
    plan = evaluate(load(folder / config["serve-app:spec"]))
    assert [each.name for each in recording.resources] == [each.name for each in plan.resources]
    assert recording.outputs == plan.outputs
    assert yaml.safe_load((folder / "Pulumi.yaml").read_text())["name"] == PROJECT


# --- restrictions and special behaviour of the clouds


def test_the_gke_system_pool_starts_with_nodes_and_gpu_pools_start_empty() -> None:
    """GKE's autoscaler adds nodes for pending pods only, not up to the minimum."""
    recording = recorded("gcp")
    assert inputs_of(recording, "serve-app-system")["initialNodeCount"] == 1, "per zone: two nodes in three zones"
    assert {each.inputs["initialNodeCount"] for each in recording.of(GROUPS["gcp"]) if "pool" in each.name} == {0}


def test_gke_nodes_do_not_use_the_default_account() -> None:
    pools = [
        inputs_of(recorded("gcp"), "serve-app-cluster"),
        *(each.inputs for each in recorded("gcp").of(GROUPS["gcp"])),
    ]
    accounts = {each["nodeConfig"]["serviceAccount"] for each in pools}
    assert accounts == {"serve-app-nodes@${gcp.project}.iam.gserviceaccount.com"}
    assert all(each["nodeConfig"]["shieldedInstanceConfig"]["enableSecureBoot"] for each in pools)


def test_a_small_gke_system_pool_uses_at_most_one_zone_per_node() -> None:
    system = inputs_of(planned("gcp", system={"min": 1, "max": 2}), "serve-app-system")
    assert (len(system["nodeLocations"]), system["initialNodeCount"]) == (2, 1)


def test_the_gcp_budget_uses_a_provider_with_the_projects_quota() -> None:
    (billing,) = [each for each in recorded("gcp").resources if each.name == "serve-app-billing"]
    assert billing.inputs["billingProject"] == "${gcp.project}"
    assert json.loads(billing.inputs["userProjectOverride"]) is True
    (budget,) = recorded("gcp").of("gcp.billing.Budget")
    assert "serve-app-billing" in budget.dependencies


def test_a_pool_uses_only_zones_that_offer_its_machine() -> None:
    pool = {"instance_types": ["a2-ultragpu-1g"]}
    group = inputs_of(planned("gcp", pool=pool), "serve-app-pool-gpu")
    assert group["nodeLocations"] == ["us-central1-a", "us-central1-c"]
    for invalid in ({"pool": {**pool, "zones": ["us-central1-b"]}}, {"pool": pool, "zones": ["us-central1-b"]}):
        with pytest.raises(
            SpecError, match="is not available in us-central1-b; it is available in us-central1-a, us-central1-c"
        ):
            evaluate(parse(document("gcp", **invalid)))
    elsewhere = inputs_of(planned("gcp", pool=pool, region="us-east4"), "serve-app-pool-gpu")
    assert len(elsewhere["nodeLocations"]) == 3, "the catalogue has no zones of this region"


def test_the_azure_lock_itself_is_not_protected() -> None:
    (lock,) = recorded("azure").of("azure-native.authorization.ManagementLockByScope")
    assert lock.protect is False


def test_the_azure_budget_covers_both_resource_groups() -> None:
    (budget,) = recorded("azure").of("azure-native.consumption.Budget")
    group = inputs_of(recorded("azure"), "serve-app-cluster")["nodeResourceGroup"]
    assert budget.inputs["scope"] == "/subscriptions/${azure.subscription}"
    assert budget.inputs["filter"]["dimensions"]["values"] == ["serve-app", group]


def test_azure_role_assignments_have_a_guid_per_subscription() -> None:
    guid = importlib.import_module("infra_pulumi.azure")._guid
    assert len({guid("a", "x"), guid("b", "x"), guid("a", "y")}) == 3
    assert guid("a", "x") == guid("a", "x")
    for each in recorded("azure").of("azure-native.authorization.RoleAssignment"):
        assert each.inputs["roleAssignmentName"] == guid("${azure.subscription}", each.name)


def test_azure_pools_are_created_one_after_the_other_with_at_most_110_pods() -> None:
    pools = recorded("azure").of(GROUPS["azure"])
    assert [{each for each in pool.dependencies if "-pool-" in each} for pool in pools] == [
        set(),
        {"serve-app-pool-gpuod"},
        {"serve-app-pool-gpusp"},
    ]
    (system,) = inputs_of(recorded("azure"), "serve-app-cluster")["agentPoolProfiles"]
    assert {pool.inputs["maxPods"] for pool in pools} | {system["maxPods"]} == {110}


def test_the_eks_api_is_reachable_from_the_network() -> None:
    (rule,) = recorded("aws").of("aws.vpc.SecurityGroupIngressRule")
    assert rule.inputs["securityGroupId"] == "${serve-app-cluster.securityGroup}"
    assert (rule.inputs["cidrIpv4"], rule.inputs["fromPort"], rule.inputs["toPort"]) == ("10.40.0.0/16", 443, 443)


def test_eks_nodes_have_the_version_of_the_control_plane() -> None:
    assert {group.inputs["version"] for group in recorded("aws").of(GROUPS["aws"])} == {"1.35"}


@pytest.mark.parametrize("protect", [True, False])
def test_a_registry_with_images_can_be_deleted_unless_protected(protect: bool) -> None:
    (registry,) = planned(protect=protect).of("aws.ecr.Repository")
    assert registry.inputs["forceDelete"] is not protect


def test_a_large_budget_is_written_without_an_exponent() -> None:
    (budget,) = planned(budget={"monthly_usd": 1_234_567.5}).of("aws.budgets.Budget")
    assert budget.inputs["limitAmount"] == "1234567.50"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pools_may_have_the_names_of_other_resources(provider: str) -> None:
    names = ["vpc", "logs", "cluster", "images", "budget"]
    pools = [{"instance_types": [TYPES[provider]], "name": name} for name in names]
    groups = evaluate(parse(document(provider, gpu_pools=pools))).of(GROUPS[provider])
    assert {f"serve-app-pool-{name}" for name in names} <= {group.name for group in groups}


ADMINISTRATORS = {
    "aws": "arn:aws:iam::123456789012:role/team",
    "gcp": "group:team@host.org",
    "azure": "0a1b2c3d-0000-4000-8000-0123456789ab",
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_administrators_have_all_rights_and_access(provider: str) -> None:
    principal = ADMINISTRATORS[provider]
    recording = planned(provider, administrators=[principal])
    given = [each for each in recording.resources if "-admin-" in each.name]
    match provider:
        case "aws":
            entry, policy = given
            assert entry.inputs["principalArn"] == policy.inputs["principalArn"] == principal
            assert policy.inputs["policyArn"].endswith("/AmazonEKSClusterAdminPolicy")
            assert entry.name in policy.dependencies
        case "gcp":
            (member,) = given
            assert (member.inputs["member"], member.inputs["role"]) == (principal, "roles/container.admin")
        case _:
            roles = {each.inputs["roleDefinitionId"].rpartition("/")[2] for each in given}
            assert roles == {"b1ff04bb-8a4e-4dc4-8eb5-8693973ce19b", "4abbcc35-e782-43d8-92c5-2d3f1bd2253f"}
            assert {each.inputs["principalId"] for each in given} == {principal}
    assert not any("-admin-" in each.name for each in planned(provider).resources)


# --- botocore's model of AWS's API


@pytest.fixture(scope="module")
def eks() -> Any:
    return botocore.session.Session().get_service_model("eks")


def test_node_groups_match_the_eks_api(eks: Any) -> None:
    members = eks.operation_model("CreateNodegroup").input_shape.members
    renamed = {"nodeGroupName": "nodegroupName", "nodeGroupNamePrefix": "nodegroupName", "nodeRoleArn": "nodeRole"}
    renamed |= {"subnetIds": "subnets"}
    for group in recorded("aws").of("aws.eks.NodeGroup"):
        assert {renamed.get(key, key) for key in group.inputs} <= set(members)
        assert group.inputs["amiType"] in members["amiType"].enum
        assert group.inputs["capacityType"] in members["capacityType"].enum
        assert set(group.inputs["scalingConfig"]) <= set(members["scalingConfig"].members)
        assert set(group.inputs["nodeRepairConfig"]) <= set(members["nodeRepairConfig"].members)
        effects = members["taints"].member.members["effect"].enum
        assert {taint["effect"] for taint in group.inputs.get("taints", [])} <= set(effects)


def test_the_cluster_matches_the_eks_api(eks: Any) -> None:
    members = eks.operation_model("CreateCluster").input_shape.members
    inputs = inputs_of(recorded("aws"), "serve-app-cluster")
    renamed = {"vpcConfig": "resourcesVpcConfig", "enabledClusterLogTypes": "logging"}
    assert {renamed.get(key, key) for key in inputs} <= set(members)
    logs = members["logging"].members["clusterLogging"].member.members["types"].member.enum
    assert set(inputs["enabledClusterLogTypes"]) <= set(logs)
    assert inputs["upgradePolicy"]["supportType"] in members["upgradePolicy"].members["supportType"].enum
    assert inputs["accessConfig"]["authenticationMode"] in members["accessConfig"].members["authenticationMode"].enum


def test_every_aws_machine_is_in_the_ec2_api() -> None:
    model = botocore.session.Session().get_service_model("ec2")
    types = set(model.shape_for("InstanceType").enum)
    assert {each.type for each in catalogue.load().instance_types if each.provider == "aws"} <= types


def test_launch_templates_match_the_ec2_api() -> None:
    model = botocore.session.Session().get_service_model("ec2")
    metadata = model.shape_for("LaunchTemplateInstanceMetadataOptionsRequest").members
    disk = model.shape_for("LaunchTemplateEbsBlockDeviceRequest").members
    for template in recorded("aws").of("aws.ec2.LaunchTemplate"):
        options = template.inputs["metadataOptions"]
        assert options["httpTokens"] in metadata["HttpTokens"].enum
        assert options["httpEndpoint"] in metadata["HttpEndpoint"].enum
        (mapping,) = template.inputs["blockDeviceMappings"]
        assert mapping["ebs"]["volumeType"] in disk["VolumeType"].enum
        assert {key[0].upper() + key[1:] for key in mapping["ebs"]} <= set(disk)


def test_trust_policies_are_json_for_aws_services() -> None:
    for role in recorded("aws").of("aws.iam.Role"):
        (statement,) = json.loads(role.inputs["assumeRolePolicy"])["Statement"]
        assert statement["Principal"]["Service"].endswith(".amazonaws.com")


# --- random descriptions


def random_value(draw: random.Random) -> Any:
    """A value that may be valid, nearly valid or invalid."""
    return draw.choice(
        [0, 1, 4, -1, 101, 10**9, 1.5, "", "gpu", "GPU", None, True, [], {}, ["x"], "10.0.0.0/16", "0.0.0.0/0"]
    )


def random_document(draw: random.Random) -> Any:
    provider = draw.choice([*PROVIDERS, *PROVIDERS, *PROVIDERS, "oracle", 3])
    types = [each.type for each in catalogue.load().instance_types]
    pool: dict[str, Any] = {"instance_types": [draw.choice([*types, TYPES.get(str(provider), "g5.xlarge")])]}
    if draw.random() < 0.8 and provider in TYPES:
        pool["instance_types"] = [TYPES[provider]]
    for key in ("min", "max", "spot", "on_demand_base", "disk_gib", "zones", "labels", "taints", "name"):
        if draw.random() < 0.1:
            pool[key] = random_value(draw)
    description: dict[str, Any] = {"provider": provider, "gpu_pools": [pool] * draw.choice([1, 1, 1, 1, 1, 2, 0])}
    keys = (
        "name",
        "region",
        "zones",
        "network",
        "system",
        "serve",
        "addons",
        "budget",
        "tags",
        "protect",
        "production",
    )
    for key in keys:
        if draw.random() < 0.05:
            description[key] = random_value(draw)
    return draw.choice([description] * 30 + [random_value(draw)])


@pytest.mark.parametrize(("count", "minimum"), [(300, 30), pytest.param(1000, 100, marks=pytest.mark.long)])
def test_random_descriptions_are_planned_or_refused_with_messages(count: int, minimum: int) -> None:
    draw = random.Random(7)
    refused: list[SpecError] = []
    accepted = 0
    for _ in range(count):
        try:
            evaluate(parse(random_document(draw)))
            accepted += 1
        except SpecError as error:
            refused.append(error)
    assert all(error.faults and all(fault.message for fault in error.faults) for error in refused)
    assert accepted > minimum
    assert len(refused) > minimum
