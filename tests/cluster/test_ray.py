"""What Ray itself makes of the files: its autoscaler, Ray Serve, `ray up`. Asked once for all of them."""

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
from infra_pulumi.rayservice import RAY_VERSION, environment, cluster_config, rayservice, read_config
from infra_pulumi.rayup import Site, rayup
from infra_pulumi.render import KEPT, ROOT
from tests.cluster.helpers import CLOUDS, CONFIG, KNOWN, Json, ask_ray, changed, description, kept

pytestmark = pytest.mark.system  # Ray takes its time to be imported

FILES = (*CLOUDS, "on-premises")
# What docs/deploy.md tells to type of Ray's own: `ray up ...`, `serve status`
COMMANDS = [
    line.split()
    for line in re.findall(
        r"(?:\.venv/bin|~/venv/bin)/((?:ray|serve) [^'`\n#]+)", (ROOT / "docs/deploy.md").read_text()
    )
]
# Every shape of a pool: (provider, spot, min, base, max)
POOLS = [
    (provider, spot, least, base, most)
    for provider in CLOUDS
    for spot, least, base, most in [(False, 0, 0, 4), (False, 2, 0, 2), (True, 0, 0, 8), (True, 2, 1, 5)]
]


def cluster(service: Json) -> Json:
    """The RayCluster that KubeRay makes of a RayService."""
    return {"metadata": {"name": "a", "namespace": "b"}, "spec": service["spec"]["rayClusterConfig"]}


def shaped(provider: str, spot: bool, least: int, base: int, most: int) -> Json:
    pool = {"spot": spot, "min": least, "on_demand_base": base, "max": most}
    return cluster(rayservice(changed(provider, pool=pool), KNOWN, read_config(CONFIG)))


def spoiled() -> dict[str, list[Json]]:
    """One of each that has to be refused, or the judges judge nothing."""
    config = cluster_config(description("aws"), KNOWN, read_config(CONFIG))
    config["applications"][0]["import_path"] = "nowhere"
    service = rayservice(description("aws"), KNOWN, read_config(CONFIG))
    del service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"]
    (file,) = kept("ray-up/aws.yaml")
    file["available_node_types"]["gpu"]["min_workres"] = 1
    return {
        "serve": [config],
        "groups": [cluster(service)],
        "ray_up": [file],
        "drain": [["--reason", "BECAUSE"]],
        "options": [["ray", "upp"]],
    }


def drain_options() -> list[str]:
    """What the image's `drain` calls Ray with, its shell variables filled in."""
    text = (KEPT / "image/drain").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ray drain-node (.*) \|\|", text, re.MULTILINE)
    values = {r'"\$\{RAY_IP[^"]*"': "10.0.0.1:6379", r'"\$node"': "a" * 56, r'"\$longest"': "600"}
    for pattern, value in values.items():
        line = re.sub(pattern, value, line)
    return [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Json:
    (aws,) = kept("ray-up/aws.yaml")
    site = Site("ami-1", "sg-1", "subnet-1", "head", "worker")
    own = rayup(changed("aws", pool={"spot": True, "min": 1, "on_demand_base": 1}), KNOWN, 600, site)
    bad = copy.deepcopy(own)
    for each in bad["available_node_types"].values():
        each["node_config"]["MetadataOptions"]["HttpToken"] = "required"
    subjects: dict[str, list[Any]] = {
        "serve": [yaml.safe_load(service(cloud)["spec"]["serveConfigV2"]) for cloud in CLOUDS]
        + [kept(f"ray-up/{cloud}.serve.yaml")[0] for cloud in CLOUDS],
        "groups": [shaped(*pool) for pool in POOLS],
        "ray_up": [kept(f"ray-up/{name}.yaml")[0] for name in FILES],
        "drain": [drain_options()],
        "options": [line[:2] for line in COMMANDS],
    }
    assert aws["cluster_name"] == own["cluster_name"]
    for name, more in spoiled().items():
        subjects[name] += more
    return ask_ray(tmp_path_factory.mktemp("home"), bootstrap=[own, bad], **subjects)


def service(cloud: str) -> Json:
    (document,) = kept(f"kubernetes/{cloud}/rayservice.yaml")
    return document


def test_the_judges_refuse_what_is_wrong(ray: Json) -> None:
    assert all("refused" in answers[-1] for answers in ray.values())


def test_ray_is_the_version_that_the_service_is_tested_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={RAY_VERSION}" in project["dependencies"]


def test_every_switch_is_one_that_this_ray_reads() -> None:
    """A switch that is misspelt, or gone, changes nothing and says nothing."""
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
    ours = {each["name"] for each in environment(600)}
    ours |= {each["name"] for each in service("aws")["spec"]["rayClusterConfig"]["autoscalerOptions"]["env"]}
    # The first is the raylet's, which is no Python, the others are the model hub's.
    ours -= {"RAY_worker_niceness", "HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY"}
    assert len(ours) > 6
    assert [name for name in sorted(ours) if f'"{name}"' not in read] == []


def test_ray_serve_takes_the_service_as_it_is_deployed(ray: Json) -> None:
    for config in ray["serve"][:-1]:
        assert "refused" not in config
        assert config["http_options"]["host"] == "0.0.0.0"
        (application,) = config["applications"]
        assert application["import_path"] == "serve_app.app:build"


@pytest.mark.parametrize("number", range(len(POOLS)), ids=lambda number: "-".join(map(str, POOLS[number])))
def test_ray_sees_the_gpus_of_a_pool_even_when_there_are_none(ray: Json, number: int) -> None:
    _, _, least, _, most = POOLS[number]
    seen = ray["groups"][number]
    head, group = seen["available_node_types"]["headgroup"], seen["available_node_types"]["gpu"]
    assert (group["min_workers"], group["max_workers"], group["resources"]["GPU"]) == (least, most, 1)
    assert head["resources"]["CPU"] == 0, "nothing of the service runs on the head"
    assert "GPU" not in head["resources"]
    assert (seen["max_workers"], seen["idle_timeout_minutes"]) == (most, 5)


@pytest.mark.parametrize("number", range(len(FILES)), ids=FILES)
def test_ray_up_takes_the_files(ray: Json, number: int) -> None:
    assert "refused" not in ray["ray_up"][number]


@pytest.mark.parametrize("name", FILES)
def test_what_ray_up_carries_to_the_nodes_is_there_and_is_the_service(name: str) -> None:
    (file,) = kept(f"ray-up/{name}.yaml")
    carried = {source for source in file["file_mounts"].values() if not source.startswith("~")}
    assert [source for source in carried if not (ROOT / source).exists()] == []
    assert {"serve_app", "pyproject.toml", "requirements.lock"} <= carried
    commands = " ".join(file["setup_commands"])
    assert f"ray --version | grep -qF {RAY_VERSION}" in commands
    for path in re.findall(r"~/serve_app/([\w./-]+)", commands):
        assert any(path == source or path.startswith(f"{source}/") for source in carried), path


@pytest.mark.parametrize("name", FILES)
def test_ray_up_starts_ray_with_a_token_and_a_dashboard_for_itself(name: str) -> None:
    (file,) = kept(f"ray-up/{name}.yaml")
    head, worker = (file[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    for start in (head, worker):
        assert re.search(r"export .*\bRAY_AUTH_MODE=token\b.*; ~/venv/bin/ray start ", start)
    text = (KEPT / f"ray-up/{name}.yaml").read_text()
    assert re.findall(r"0\.0\.0\.0|AKIA|BEGIN [A-Z ]*PRIVATE", text) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_is_never_spot_and_no_machine_has_a_public_address(cloud: str) -> None:
    spot = rayup(changed(cloud, pool={"spot": True, "min": 0, "on_demand_base": 0}), KNOWN, 600)
    assert spot["provider"]["use_internal_ips"] is True
    types = spot["available_node_types"]
    assert re.search("(?i)spot", str(types["gpu"]))
    assert not re.search("(?i)spot", str(types["head"]))
    assert types["head"]["resources"] == {"CPU": 0}
    steady = rayup(changed(cloud, pool={"spot": False, "min": 0, "on_demand_base": 0}), KNOWN, 600)
    assert not re.search("(?i)spot", str(steady["available_node_types"]))


def test_on_gcp_a_machine_with_a_card_beside_it_gets_the_card() -> None:
    spec = changed("gcp", pool={"instance_types": ["n1-standard-4+t4"]})
    (config,) = (
        each["node_config"] for name, each in rayup(spec, KNOWN, 600)["available_node_types"].items() if name == "gpusp"
    )
    assert config["machineType"] == "n1-standard-4"
    kind = "zones/us-central1-a/acceleratorTypes/nvidia-tesla-t4"
    assert config["guestAccelerators"] == [{"acceleratorType": kind, "acceleratorCount": 1}]
    assert "accessConfigs" not in str(config["networkInterfaces"])


def test_on_gcp_everything_is_in_a_zone_that_has_it() -> None:
    pool = {"instance_types": ["a2-ultragpu-1g"]}
    spec = changed("gcp", zones=["us-central1-b", "us-central1-c"], pool=pool)
    assert rayup(spec, KNOWN, 600)["provider"]["availability_zone"] == "us-central1-c"
    apart = [{"name": name, **pool, "zones": [f"us-central1-{name}"]} for name in ("a", "c")]
    with pytest.raises(CatalogueError, match="none has those of every pool"):
        rayup(changed("gcp", gpu_pools=apart), KNOWN, 600)


def test_the_drain_of_the_image_is_one_that_ray_knows(ray: Json) -> None:
    asked = ray["drain"][0]
    assert asked["deadline_remaining_seconds"] == 600
    assert asked["node_id"] == "a" * 56
    assert asked["address"] == "10.0.0.1:6379"


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: " ".join(COMMANDS[number][:2]))
def test_what_the_page_tells_to_type_is_there(ray: Json, number: int) -> None:
    known = ray["options"][number]
    assert "refused" not in known, known
    assert [word for word in COMMANDS[number] if word.startswith("--") and word not in known] == []


def test_on_aws_ray_up_opens_nothing_and_makes_no_role(ray: Json) -> None:
    made = ray["bootstrap"][0]
    assert "refused" not in made, made
    rules = {group["name"]: group["rules"] for group in made["groups"]}
    assert set(rules) == {"default", "ray"}, "Ray made a group, and its own let SSH in from everywhere"
    assert "0.0.0.0/0" not in str(rules)
    assert made["roles"] == []


def test_on_aws_the_machines_are_private_encrypted_and_the_head_is_not_spot(ray: Json) -> None:
    instances = ray["bootstrap"][0]["instances"]
    assert {name: each["spot"] for name, each in instances.items()} == {"head": False, "gpuod": False, "gpusp": True}
    for each in instances.values():
        assert (each["public"], each["private"], each["tokens"]) == (None, True, "required")
        assert each["encrypted"]
        assert all(each["encrypted"])
