"""The rendered files, validated by Ray's own code: autoscaler, Ray Serve, `ray up`. One Ray process for all tests."""

from __future__ import annotations

import copy
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra_pulumi.catalogue import CatalogueError
from infra_pulumi.rayservice import OPTIONAL_SECRETS, RAY_VERSION, environment, rayservice
from infra_pulumi.rayup import Site, rayup
from infra_pulumi.serve_config import cluster_config, read_config
from tests.cluster.helpers import (
    CATALOGUE,
    CLOUDS,
    CLUSTER,
    CONFIG,
    ROOT,
    Json,
    changed,
    description,
    documents,
    rendered,
    service,
    validate_with_ray,
)

pytestmark = pytest.mark.slow

# Cloud and name of each `ray up` file.
FILES = [*((cloud, cloud) for cloud in CLOUDS), ("aws", "on-premises")]
# The commands of `ray` and `serve` in docs/deploy.md.
COMMANDS = [
    line.split()
    for line in re.findall(
        r"(?:\.venv/bin|~/venv/bin)/((?:ray|serve) [^'`\n#]+)", (ROOT / "docs/deploy.md").read_text()
    )
]
# Variants of a pool: (provider, spot, min, on_demand_base, max).
POOLS = [
    (provider, spot, minimum, base, maximum)
    for provider in CLOUDS
    for spot, minimum, base, maximum in [(False, 0, 0, 4), (False, 2, 0, 2), (True, 0, 0, 8), (True, 2, 1, 5)]
]


def cluster(service: Json) -> Json:
    """The RayCluster that KubeRay creates for a RayService."""
    return {"metadata": {"name": "a", "namespace": "b"}, "spec": service["spec"]["rayClusterConfig"]}


def cluster_with_pool(provider: str, spot: bool, minimum: int, base: int, maximum: int) -> Json:
    pool = {"spot": spot, "min": minimum, "on_demand_base": base, "max": maximum}
    return cluster(rayservice(changed(provider, pool=pool), CATALOGUE, read_config(CONFIG)))


def invalid_subjects() -> dict[str, list[Json]]:
    """One subject per validator that Ray must refuse, to show that the validators work."""
    config = cluster_config(description("aws"), CATALOGUE, read_config(CONFIG))
    config["applications"][0]["import_path"] = "nowhere"
    broken = rayservice(description("aws"), CATALOGUE, read_config(CONFIG))
    del broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"]
    (file,) = documents("aws", "ray-up/aws.yaml")
    file["available_node_types"]["gpu"]["min_workres"] = 1
    return {
        "serve": [config],
        "groups": [cluster(broken)],
        "ray_up": [file],
        "drain": [["--reason", "BECAUSE"]],
        "options": [["ray", "upp"]],
    }


def drain_options() -> list[str]:
    """The arguments that the image's `drain` passes to Ray, with values for its shell variables."""
    text = (CLUSTER / "image/drain").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ray drain-node (.*) \|\|", text, re.MULTILINE)
    values = {r'"\$\{RAY_IP[^"]*"': "10.0.0.1:6379", r'"\$node"': "a" * 56, r'"\$longest"': "600"}
    for pattern, value in values.items():
        line = re.sub(pattern, value, line)
    return [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Json:
    site = Site("ami-1", "sg-1", "subnet-1", "head", "worker")
    pool = {"spot": True, "min": 1, "on_demand_base": 1}
    valid = rayup(changed("aws", pool=pool), CATALOGUE, 600, "serve.yaml", site)
    invalid = copy.deepcopy(valid)
    for each in invalid["available_node_types"].values():
        each["node_config"]["MetadataOptions"]["HttpToken"] = "required"
    subjects: dict[str, list[Any]] = {
        "serve": [yaml.safe_load(service(cloud)["spec"]["serveConfigV2"]) for cloud in CLOUDS]
        + [documents(cloud, "ray-up/serve.yaml")[0] for cloud in CLOUDS],
        "groups": [cluster_with_pool(*pool) for pool in POOLS],
        "ray_up": [documents(cloud, f"ray-up/{name}.yaml")[0] for cloud, name in FILES],
        "drain": [drain_options()],
        "options": [line[:2] for line in COMMANDS],
    }
    for name, refused in invalid_subjects().items():
        subjects[name] += refused
    return validate_with_ray(tmp_path_factory.mktemp("home"), bootstrap=[valid, invalid], **subjects)


def test_ray_refuses_invalid_subjects(ray: Json) -> None:
    assert all("refused" in results[-1] for results in ray.values())


def test_the_manifests_have_the_projects_version_of_ray() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={RAY_VERSION}" in project["dependencies"]


def test_ray_reads_every_environment_variable_of_the_manifests() -> None:
    """Ray ignores a misspelt or removed variable silently."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    sources = [
        *root.glob("serve/_private/*.py"),
        *root.glob("autoscaler/v2/**/*.py"),
        *root.glob("_common/usage/*.py"),
    ]
    read = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    variables = {each["name"] for each in environment(600)}
    variables |= {each["name"] for each in service("aws")["spec"]["rayClusterConfig"]["autoscalerOptions"]["env"]}
    # The raylet, which is not Python, reads the first one, the model hub and the service the others.
    variables -= {"RAY_worker_niceness", "HF_HUB_DISABLE_TELEMETRY", *OPTIONAL_SECRETS}
    assert len(variables) > 6
    assert [name for name in sorted(variables) if f'"{name}"' not in read] == []


def test_ray_serve_accepts_the_rendered_config(ray: Json) -> None:
    for config in ray["serve"][:-1]:
        assert "refused" not in config
        assert config["http_options"]["host"] == "0.0.0.0"
        (application,) = config["applications"]
        assert application["import_path"] == "serve_app.app:build"


@pytest.mark.parametrize("number", range(len(POOLS)), ids=lambda number: "-".join(map(str, POOLS[number])))
def test_rays_autoscaler_knows_the_gpus_of_an_empty_pool(ray: Json, number: int) -> None:
    _, _, minimum, _, maximum = POOLS[number]
    config = ray["groups"][number]
    head, group = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert (group["min_workers"], group["max_workers"], group["resources"]["GPU"]) == (minimum, maximum, 1)
    assert head["resources"]["CPU"] == 0, "no replica may run on the head"
    assert "GPU" not in head["resources"]
    assert (config["max_workers"], config["idle_timeout_minutes"]) == (maximum, 5)


@pytest.mark.parametrize("number", range(len(FILES)), ids=[name for _, name in FILES])
def test_ray_up_accepts_the_rendered_files(ray: Json, number: int) -> None:
    assert "refused" not in ray["ray_up"][number]


@pytest.mark.parametrize(("cloud", "name"), FILES)
def test_the_files_that_ray_up_copies_exist_and_contain_the_service(cloud: str, name: str) -> None:
    (file,) = documents(cloud, f"ray-up/{name}.yaml")
    copied = {source for source in file["file_mounts"].values() if not source.startswith("~")}
    written = {f"rendered/{path}" for path in rendered(cloud)}
    assert [source for source in copied - written if not (ROOT / source).exists()] == []
    assert {"serve_app", "pyproject.toml", "requirements.lock", "rendered/ray-up/serve.yaml"} <= copied
    commands = " ".join(file["setup_commands"])
    assert f"ray --version | grep -qF {RAY_VERSION}" in commands
    for path in re.findall(r"~/serve_app/([\w./-]+)", commands):
        assert any(path == source or path.startswith(f"{source}/") for source in copied), path


@pytest.mark.parametrize(("cloud", "name"), FILES)
def test_ray_up_starts_ray_with_a_token_and_a_local_dashboard(cloud: str, name: str) -> None:
    (file,) = documents(cloud, f"ray-up/{name}.yaml")
    head, worker = (file[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    for start in (head, worker):
        assert re.search(r"export .*\bRAY_AUTH_MODE=token\b.*; ~/venv/bin/ray start ", start)
    text = rendered(cloud)[f"ray-up/{name}.yaml"]
    assert re.findall(r"0\.0\.0\.0|AKIA|BEGIN [A-Z ]*PRIVATE", text) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_is_on_demand_and_no_machine_has_a_public_address(cloud: str) -> None:
    spot = rayup(changed(cloud, pool={"spot": True, "min": 0, "on_demand_base": 0}), CATALOGUE, 600, "serve.yaml")
    assert spot["provider"]["use_internal_ips"] is True
    types = spot["available_node_types"]
    assert re.search("(?i)spot", str(types["gpu"]))
    assert not re.search("(?i)spot", str(types["head"]))
    assert types["head"]["resources"] == {"CPU": 0}
    on_demand = rayup(changed(cloud, pool={"spot": False, "min": 0, "on_demand_base": 0}), CATALOGUE, 600, "serve.yaml")
    assert not re.search("(?i)spot", str(on_demand["available_node_types"]))


def test_on_gcp_an_attached_gpu_is_configured() -> None:
    spec = changed("gcp", pool={"instance_types": ["n1-standard-4+t4"]})
    (config,) = (
        each["node_config"]
        for name, each in rayup(spec, CATALOGUE, 600, "serve.yaml")["available_node_types"].items()
        if name == "gpusp"
    )
    assert config["machineType"] == "n1-standard-4"
    kind = "zones/us-central1-a/acceleratorTypes/nvidia-tesla-t4"
    assert config["guestAccelerators"] == [{"acceleratorType": kind, "acceleratorCount": 1}]
    assert "accessConfigs" not in str(config["networkInterfaces"])


def test_on_gcp_all_machines_are_in_one_zone_that_offers_them() -> None:
    pool = {"instance_types": ["a2-ultragpu-1g"]}
    spec = changed("gcp", zones=["us-central1-b", "us-central1-c"], pool=pool)
    assert rayup(spec, CATALOGUE, 600, "serve.yaml")["provider"]["availability_zone"] == "us-central1-c"
    apart = [{"name": name, **pool, "zones": [f"us-central1-{name}"]} for name in ("a", "c")]
    with pytest.raises(CatalogueError, match="no zone offers the machines of every pool"):
        rayup(changed("gcp", gpu_pools=apart), CATALOGUE, 600, "serve.yaml")


def test_ray_accepts_the_drain_command_of_the_image(ray: Json) -> None:
    options = ray["drain"][0]
    assert options["deadline_remaining_seconds"] == 600
    assert options["node_id"] == "a" * 56
    assert options["address"] == "10.0.0.1:6379"


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: " ".join(COMMANDS[number][:2]))
def test_ray_accepts_the_commands_of_the_page(ray: Json, number: int) -> None:
    options = ray["options"][number]
    assert "refused" not in options, options
    assert [word for word in COMMANDS[number] if word.startswith("--") and word not in options] == []


def test_on_aws_ray_up_opens_no_port_and_creates_no_role(ray: Json) -> None:
    account = ray["bootstrap"][0]
    assert "refused" not in account, account
    rules = {group["name"]: group["rules"] for group in account["groups"]}
    assert set(rules) == {"default", "ray"}, "a group that Ray creates allows SSH from all addresses"
    assert "0.0.0.0/0" not in str(rules)
    assert account["roles"] == []


def test_on_aws_the_machines_are_private_and_encrypted_and_the_head_is_on_demand(ray: Json) -> None:
    instances = ray["bootstrap"][0]["instances"]
    assert {name: each["spot"] for name, each in instances.items()} == {"head": False, "gpuod": False, "gpusp": True}
    for each in instances.values():
        assert (each["public"], each["private"], each["tokens"]) == (None, True, "required")
        assert each["encrypted"]
        assert all(each["encrypted"])
