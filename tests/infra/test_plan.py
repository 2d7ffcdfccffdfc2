"""The programs of the three clouds, recorded: what is asked for, in which order, the same every time."""

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
from tests.infra.helpers import TYPES, document, full, recorded

pytestmark = pytest.mark.infra

PROVIDERS = get_args(Provider)
GROUPS = {
    "aws": "aws.eks.NodeGroup",
    "gcp": "gcp.container.NodePool",
    "azure": "azure-native.containerservice.AgentPool",
}
SDKS = {"aws": "pulumi_aws", "gcp": "pulumi_gcp", "azure-native": "pulumi_azure_native"}


def one(recording: Recording, name: str) -> dict[str, Any]:
    (resource,) = [each for each in recording.resources if each.name == name]
    return resource.inputs


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_same_description_is_the_same_plan_to_the_byte(provider: str) -> None:
    assert evaluate(full(provider)).json() == recorded(provider).json()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_everything_is_below_a_component_and_after_what_it_needs(provider: str) -> None:
    seen: set[str] = set()
    for resource in recorded(provider).resources:
        assert set(resource.dependencies) <= seen, resource.name
        above = "serve-app-addons" if "kubernetes" in resource.type.split(":") else "serve-app"
        assert resource.parent == (above if resource.custom else None)
        seen.add(resource.name)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_cloud_tells_the_same(provider: str) -> None:
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
    assert len(outputs["node_groups"]) == 4  # the system's, two of one pool, and one


def required(resource: Resource) -> set[str]:
    """What its constructor refuses to do without, by the SDK's own code."""
    package, module, name = resource.type.split(":")
    made = getattr(importlib.import_module(f"{SDKS[package]}.{module.partition('/')[0]}"), name)
    return set(re.findall(r"Missing required property '(\w+)'", inspect.getsource(made._internal_init)))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_that_a_resource_needs_was_lost_on_the_way(provider: str) -> None:
    """An output that a plan does not know is None, and Pulumi leaves what is None out without a word."""
    for resource in recorded(provider).resources:
        if resource.type.split(":")[0] in SDKS:
            camel = {re.sub(r"_(\w)", lambda match: match[1].upper(), key).rstrip("_") for key in required(resource)}
            assert camel <= set(resource.inputs), resource.name


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_name_of_what_is_not_known_yet_is_empty(provider: str) -> None:
    assert re.findall(r"None|\$\{\}|\$\{[^}]*\$", recorded(provider).json()) == []


MATRIX = [
    (machine.provider, machine.type, spot, least)
    for machine in catalogue.load().instance_types
    if machine.gpu and not machine.refused
    for spot, least in itertools.product((False, True), (0, 1))
]


@pytest.mark.perf
def test_every_machine_on_spot_or_not_from_zero_or_one() -> None:
    assert len(MATRIX) >= 96
    began = time.process_time()
    for provider, machine, spot, least in MATRIX:
        spec = parse(document(provider, pool={"instance_types": [machine], "spot": spot, "min": least, "max": 3}))
        group = one(evaluate(spec), "serve-app-pool-gpu")
        assert pool_facts(provider, group) == (spot, least, 3, machine.partition("+")[0])
    assert time.process_time() - began < 60


def pool_facts(provider: str, group: dict[str, Any]) -> tuple[bool, int, int, str]:
    """Spot, least, most and machine of a pool, as each cloud says it."""
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
def test_a_part_on_demand_has_the_same_label(provider: str) -> None:
    where = {"aws": "labels", "gcp": "nodeConfig", "azure": "nodeLabels"}[provider]
    labels = [one(recorded(provider), f"serve-app-pool-{name}")[where] for name in ("gpuod", "gpusp")]
    if provider == "gcp":
        labels = [each["labels"] for each in labels]
    assert [each["serve-app/pool"] for each in labels] == ["gpu", "gpu"]
    assert [each["serve-app/capacity"] for each in labels] == ["on-demand", "spot"]


def test_aws_tags_are_what_makes_a_group_scale_from_zero() -> None:
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


def test_gke_gets_a_gpu_pool_after_the_system_pool_and_no_second_taint() -> None:
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
def test_gke_calls_gpus_by_names_of_its_own(machine: str, accelerator: str, count: int) -> None:
    pool = one(evaluate(parse(document("gcp", pool={"instance_types": [machine]}))), "serve-app-pool-gpu")
    (found,) = pool["nodeConfig"]["guestAccelerators"]
    assert (found["type"], found["count"]) == (accelerator, count)


@pytest.mark.parametrize("zones", [2, 3, 6])
@pytest.mark.parametrize("cidr", ["10.40.0.0/16", "192.168.0.0/20"])
def test_subnets_on_aws_do_not_overlap_and_are_in_the_range(zones: int, cidr: str) -> None:
    names = [f"us-east-1{letter}" for letter in "abcdef"[:zones]]
    recording = evaluate(parse(document(region="us-east-1", zones=names, network={"cidr": cidr})))
    blocks = [ipaddress.IPv4Network(each.inputs["cidrBlock"]) for each in recording.of("aws.ec2.Subnet")]
    assert len(blocks) == 2 * zones
    assert all(block.subnet_of(ipaddress.IPv4Network(cidr)) for block in blocks)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(blocks, 2))


@pytest.mark.parametrize(("nat", "gateways"), [("one", 1), ("per-zone", 2)])
def test_each_zone_has_a_way_out(nat: str, gateways: int) -> None:
    recording = evaluate(parse(document(network={"nat": nat})))
    assert len(recording.of("aws.ec2.NatGateway")) == gateways
    private = [each for each in recording.of("aws.ec2.Route") if "natGatewayId" in each.inputs]
    assert len({each.inputs["natGatewayId"] for each in private}) == gateways
    assert len(private) == 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_a_list_of_callers_the_api_is_private(provider: str) -> None:
    private, listed = (
        one(evaluate(parse(document(provider, network={"api_cidrs": cidrs}))), "serve-app-cluster")
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
            ], "the nodes' own way"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_whoever_is_protected_cannot_be_deleted(provider: str) -> None:
    protected = {each.kind for each in recorded(provider).resources if each.protect}
    assert {"aws": "aws.eks.Cluster", "gcp": "gcp.container.Cluster"}.get(
        provider, "azure-native.containerservice.ManagedCluster"
    ) in protected
    assert not any(each.protect for each in evaluate(parse(document(provider))).resources)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_program_for_pulumis_own_cli_makes_the_same(provider: str) -> None:
    """As `pulumi up` runs it, with the description that the stack's file names."""
    where = Path(program.__file__).parent
    config = yaml.safe_load((where / f"Pulumi.{provider}.yaml").read_text())["config"]
    computed_outputs = importlib.import_module(f"infra_pulumi.{provider}").computed_outputs

    def run() -> None:
        pulumi.runtime.set_all_config(config)
        program.main()

    made = record(run, "serve-app", RecordingMonitor(computed_outputs))
    planned = evaluate(load(where / config["serve-app:spec"]))
    assert [each.name for each in made.resources] == [each.name for each in planned.resources]
    assert made.outputs == planned.outputs
    assert yaml.safe_load((where / "Pulumi.yaml").read_text())["name"] == PROJECT


# --- what a cloud refuses, or does otherwise than it sounds


def test_the_system_pool_of_gke_begins_with_nodes_and_a_gpu_pool_with_none() -> None:
    """Its autoscaler adds none up to the minimum: nobody could run what makes the first pods."""
    recording = recorded("gcp")
    assert one(recording, "serve-app-system")["initialNodeCount"] == 1, "two are asked for, and there are three zones"
    assert {each.inputs["initialNodeCount"] for each in recording.of(GROUPS["gcp"]) if "pool" in each.name} == {0}


def test_no_node_of_gke_is_a_default_account() -> None:
    made = [one(recorded("gcp"), "serve-app-cluster"), *(each.inputs for each in recorded("gcp").of(GROUPS["gcp"]))]
    accounts = {each["nodeConfig"]["serviceAccount"] for each in made}
    assert accounts == {"serve-app-nodes@${gcp.project}.iam.gserviceaccount.com"}
    assert all(each["nodeConfig"]["shieldedInstanceConfig"]["enableSecureBoot"] for each in made)


def test_a_small_system_pool_of_gke_is_in_as_many_zones() -> None:
    system = one(evaluate(parse(document("gcp", system={"min": 1, "max": 2}))), "serve-app-system")
    assert (len(system["nodeLocations"]), system["initialNodeCount"]) == (2, 1)


def test_gcps_budget_is_asked_for_on_the_projects_account() -> None:
    (billing,) = [each for each in recorded("gcp").resources if each.name == "serve-app-billing"]
    assert billing.inputs["billingProject"] == "${gcp.project}"
    assert json.loads(billing.inputs["userProjectOverride"]) is True
    (budget,) = recorded("gcp").of("gcp.billing.Budget")
    assert "serve-app-billing" in budget.dependencies


def test_a_machine_that_some_zones_lack_is_put_where_it_is() -> None:
    pool = {"instance_types": ["a2-ultragpu-1g"]}
    group = one(evaluate(parse(document("gcp", pool=pool))), "serve-app-pool-gpu")
    assert group["nodeLocations"] == ["us-central1-a", "us-central1-c"]
    for wrong in ({"pool": {**pool, "zones": ["us-central1-b"]}}, {"pool": pool, "zones": ["us-central1-b"]}):
        with pytest.raises(SpecError, match="is not in us-central1-b; it is in us-central1-a, us-central1-c"):
            evaluate(parse(document("gcp", **wrong)))
    elsewhere = document("gcp", pool=pool, region="us-east4")
    assert len(one(evaluate(parse(elsewhere)), "serve-app-pool-gpu")["nodeLocations"]) == 3, "nothing is known of it"


def test_what_holds_an_azure_cluster_can_be_taken_away() -> None:
    (lock,) = recorded("azure").of("azure-native.authorization.ManagementLockByScope")
    assert lock.protect is False


def test_azures_budget_sees_the_machines_too() -> None:
    (budget,) = recorded("azure").of("azure-native.consumption.Budget")
    group = one(recorded("azure"), "serve-app-cluster")["nodeResourceGroup"]
    assert budget.inputs["scope"] == "/subscriptions/${azure.subscription}"
    assert budget.inputs["filter"]["dimensions"]["values"] == ["serve-app", group]


def test_azures_assignments_are_each_subscriptions_own() -> None:
    guid = importlib.import_module("infra_pulumi.azure")._guid
    assert len({guid("a", "x"), guid("b", "x"), guid("a", "y")}) == 3
    assert guid("a", "x") == guid("a", "x")
    for each in recorded("azure").of("azure-native.authorization.RoleAssignment"):
        assert each.inputs["roleAssignmentName"] == guid("${azure.subscription}", each.name)


def test_azures_pools_are_made_one_after_the_other_and_keep_memory_for_110_pods() -> None:
    pools = recorded("azure").of(GROUPS["azure"])
    assert [{each for each in pool.dependencies if "-pool-" in each} for pool in pools] == [
        set(),
        {"serve-app-pool-gpuod"},
        {"serve-app-pool-gpusp"},
    ]
    (system,) = one(recorded("azure"), "serve-app-cluster")["agentPoolProfiles"]
    assert {pool.inputs["maxPods"] for pool in pools} | {system["maxPods"]} == {110}


def test_the_api_of_eks_is_reached_from_inside_the_network() -> None:
    (rule,) = recorded("aws").of("aws.vpc.SecurityGroupIngressRule")
    assert rule.inputs["securityGroupId"] == "${serve-app-cluster.securityGroup}"
    assert (rule.inputs["cidrIpv4"], rule.inputs["fromPort"], rule.inputs["toPort"]) == ("10.40.0.0/16", 443, 443)


def test_nodes_of_eks_are_upgraded_with_the_control_plane() -> None:
    assert {group.inputs["version"] for group in recorded("aws").of(GROUPS["aws"])} == {"1.35"}


@pytest.mark.parametrize("protect", [True, False])
def test_a_registry_with_images_goes_unless_it_is_protected(protect: bool) -> None:
    (registry,) = evaluate(parse(document(protect=protect))).of("aws.ecr.Repository")
    assert registry.inputs["forceDelete"] is not protect


def test_a_budget_of_millions_is_written_out() -> None:
    (budget,) = evaluate(parse(document(budget={"monthly_usd": 1_234_567.5}))).of("aws.budgets.Budget")
    assert budget.inputs["limitAmount"] == "1234567.50"


@pytest.mark.parametrize("name", ["vpc", "logs", "cluster", "images", "budget"])
def test_a_pool_may_have_any_name_but_the_systems(name: str) -> None:
    for provider in PROVIDERS:
        evaluate(parse(document(provider, pool={"name": name})))


ADMINISTRATORS = {
    "aws": "arn:aws:iam::123456789012:role/team",
    "gcp": "group:team@host.org",
    "azure": "0a1b2c3d-0000-4000-8000-0123456789ab",
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_administrators_have_the_right_to_administer_and_to_get_in(provider: str) -> None:
    who = ADMINISTRATORS[provider]
    recording = evaluate(parse(document(provider, administrators=[who])))
    given = [each for each in recording.resources if "-admin-" in each.name]
    match provider:
        case "aws":
            entry, policy = given
            assert entry.inputs["principalArn"] == policy.inputs["principalArn"] == who
            assert policy.inputs["policyArn"].endswith("/AmazonEKSClusterAdminPolicy")
            assert entry.name in policy.dependencies
        case "gcp":
            (member,) = given
            assert (member.inputs["member"], member.inputs["role"]) == (who, "roles/container.admin")
        case _:
            roles = {each.inputs["roleDefinitionId"].rpartition("/")[2] for each in given}
            assert roles == {"b1ff04bb-8a4e-4dc4-8eb5-8693973ce19b", "4abbcc35-e782-43d8-92c5-2d3f1bd2253f"}
            assert {each.inputs["principalId"] for each in given} == {who}
    assert not any("-admin-" in each.name for each in evaluate(parse(document(provider))).resources)


# --- AWS's own description of its API, which botocore brings along


@pytest.fixture(scope="module")
def eks() -> Any:
    return botocore.session.Session().get_service_model("eks")


def test_node_groups_are_what_eks_takes(eks: Any) -> None:
    members = eks.operation_model("CreateNodegroup").input_shape.members
    ours = {"nodeGroupName": "nodegroupName", "nodeGroupNamePrefix": "nodegroupName", "nodeRoleArn": "nodeRole"}
    ours |= {"subnetIds": "subnets"}
    for group in recorded("aws").of("aws.eks.NodeGroup"):
        assert {ours.get(key, key) for key in group.inputs} <= set(members)
        assert group.inputs["amiType"] in members["amiType"].enum
        assert group.inputs["capacityType"] in members["capacityType"].enum
        assert set(group.inputs["scalingConfig"]) <= set(members["scalingConfig"].members)
        assert set(group.inputs["nodeRepairConfig"]) <= set(members["nodeRepairConfig"].members)
        effects = members["taints"].member.members["effect"].enum
        assert {taint["effect"] for taint in group.inputs.get("taints", [])} <= set(effects)


def test_a_cluster_is_what_eks_takes(eks: Any) -> None:
    members = eks.operation_model("CreateCluster").input_shape.members
    inputs = one(recorded("aws"), "serve-app-cluster")
    ours = {"vpcConfig": "resourcesVpcConfig", "enabledClusterLogTypes": "logging"}
    assert {ours.get(key, key) for key in inputs} <= set(members)
    logs = members["logging"].members["clusterLogging"].member.members["types"].member.enum
    assert set(inputs["enabledClusterLogTypes"]) <= set(logs)
    assert inputs["upgradePolicy"]["supportType"] in members["upgradePolicy"].members["supportType"].enum
    assert inputs["accessConfig"]["authenticationMode"] in members["accessConfig"].members["authenticationMode"].enum


def test_every_machine_of_aws_is_one_that_ec2_knows() -> None:
    model = botocore.session.Session().get_service_model("ec2")
    known = set(model.shape_for("InstanceType").enum)
    assert {each.type for each in catalogue.load().instance_types if each.provider == "aws"} <= known


def test_a_launch_template_is_what_ec2_takes() -> None:
    model = botocore.session.Session().get_service_model("ec2")
    metadata = model.shape_for("LaunchTemplateInstanceMetadataOptionsRequest").members
    disk = model.shape_for("LaunchTemplateEbsBlockDeviceRequest").members
    for template in recorded("aws").of("aws.ec2.LaunchTemplate"):
        told = template.inputs["metadataOptions"]
        assert told["httpTokens"] in metadata["HttpTokens"].enum
        assert told["httpEndpoint"] in metadata["HttpEndpoint"].enum
        (mapping,) = template.inputs["blockDeviceMappings"]
        assert mapping["ebs"]["volumeType"] in disk["VolumeType"].enum
        assert {key[0].upper() + key[1:] for key in mapping["ebs"]} <= set(disk)


def test_policies_are_json_of_named_actions() -> None:
    for role in recorded("aws").of("aws.iam.Role"):
        (statement,) = json.loads(role.inputs["assumeRolePolicy"])["Statement"]
        assert statement["Principal"]["Service"].endswith(".amazonaws.com")


# --- whatever is written into a description


def anything(draw: random.Random) -> Any:
    """A value that may fit, nearly fit, or not at all."""
    pick = draw.choice
    return pick([0, 1, 4, -1, 101, 10**9, 1.5, "", "gpu", "GPU", None, True, [], {}, ["x"], "10.0.0.0/16", "0.0.0.0/0"])


def random_document(draw: random.Random) -> Any:
    provider = draw.choice([*PROVIDERS, *PROVIDERS, *PROVIDERS, "oracle", 3])
    types = [each.type for each in catalogue.load().instance_types]
    pool: dict[str, Any] = {"instance_types": [draw.choice([*types, TYPES.get(str(provider), "g5.xlarge")])]}
    if draw.random() < 0.8 and provider in TYPES:
        pool["instance_types"] = [TYPES[provider]]
    for key in ("min", "max", "spot", "on_demand_base", "disk_gib", "zones", "labels", "taints", "name"):
        if draw.random() < 0.1:
            pool[key] = anything(draw)
    whole: dict[str, Any] = {"provider": provider, "gpu_pools": [pool] * draw.choice([1, 1, 1, 1, 1, 2, 0])}
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
            whole[key] = anything(draw)
    return draw.choice([whole] * 30 + [anything(draw)])


@pytest.mark.perf
def test_a_thousand_random_descriptions_are_planned_or_refused_in_words() -> None:
    draw = random.Random(7)
    refused: list[SpecError] = []
    planned = 0
    for _ in range(1000):
        try:
            evaluate(parse(random_document(draw)))
            planned += 1
        except SpecError as error:
            refused.append(error)
    assert all(error.faults and all(fault.message for fault in error.faults) for error in refused)
    assert planned > 100
    assert len(refused) > 100
