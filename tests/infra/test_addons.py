"""What Pulumi makes in the cluster: what `render` writes, in its order, after the cluster and without a secret."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

import pulumi
import pytest
import yaml
from pulumi import automation as auto

from infra_pulumi import catalogue, deploy, program, render
from infra_pulumi.__main__ import main
from infra_pulumi.charts import charts
from infra_pulumi.objects import IDENTITY_ANNOTATION
from infra_pulumi.plan import evaluate
from infra_pulumi.rayservice import image_in
from infra_pulumi.record import Recording, RecordingMonitor, Resource, record
from infra_pulumi.spec import Provider, SpecError, parse
from tests.infra.test_deploy import Command
from tests.infra.helpers import CONFIG, TYPES, document, full, recorded

pytestmark = pytest.mark.infra

PROVIDERS = get_args(Provider)
RELEASE = "kubernetes.helm.sh.Release"


def inside(provider: str) -> list[Resource]:
    """What is made in the cluster, in its order."""
    return [each for each in recorded(provider).resources if each.type.startswith("kubernetes:")]


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """An object without what is said to Pulumi, and without who the workers are to the cloud."""
    ours = ("pulumi.com/", *IDENTITY_ANNOTATION.values())
    annotations = inputs["metadata"].get("annotations", {})
    kept = {key: value for key, value in annotations.items() if not key.startswith(ours)}
    metadata = {key: value for key, value in inputs["metadata"].items() if key != "annotations"}
    return {**inputs, "metadata": {**metadata, "annotations": kept} if kept else metadata}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_objects_are_those_that_are_rendered(provider: str) -> None:
    """The image is the one that kustomize would write, with the registry of the cluster."""
    spec, files = full(provider), render.manifests(full(provider), catalogue.load(), CONFIG)
    image = image_in(spec, recorded(provider).outputs["registry"])
    texts = [files[name].replace(f"image: {spec.serve.image}\n", f"image: {image}\n") for name in files]
    documents = [each for text in texts for each in yaml.safe_load_all(text) if "metadata" in each]
    assert [plain(each.inputs) for each in inside(provider) if each.kind != RELEASE] == documents
    assert f"image: {image}\n" in "".join(texts)


def test_kinds_are_called_as_the_sdk_calls_them() -> None:
    """Which has no RayService: the cluster learns of that by KubeRay's chart."""
    for _, module, kind in {tuple(each.type.split(":")) for each in inside("aws")}:
        group, version = module.split("/")
        if group not in ("helm.sh", "ray.io"):
            sdk = importlib.import_module(f"pulumi_kubernetes.{group.partition('.')[0]}.{version}")
            assert f"'kubernetes:{module}:{kind}'" in inspect.getsource(getattr(sdk, kind))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_charts_are_those_that_are_rendered(provider: str) -> None:
    files = render.manifests(full(provider), catalogue.load(), CONFIG)
    values = [yaml.safe_load(text) for name, text in files.items() if name.startswith("values/")]
    made = [each.inputs for each in inside(provider) if each.kind == RELEASE]
    assert [each["values"] for each in made] == values
    told = [(each["name"], each["chart"], each["version"], each["namespace"]) for each in made]
    assert told == [(each.release, each.chart, each.version, each.namespace) for each in charts(full(provider))]
    assert [each["repositoryOpts"]["repo"] for each in made] == [each.repository for each in charts(full(provider))]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_workers_are_told_who_they_are_to_the_cloud(provider: str) -> None:
    (account,) = [each.inputs for each in inside(provider) if each.kind == "kubernetes.core.ServiceAccount"]
    annotations = account["metadata"].get("annotations", {})
    key = IDENTITY_ANNOTATION.get(provider)
    assert annotations == ({key: recorded(provider).outputs["identity"]} if key else {})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_waits_for_the_one_before_it_and_all_for_the_whole_cluster(provider: str) -> None:
    """What is made last is deleted first, so that the service goes before its operator, and the cluster at the end."""
    below = [each for each in recorded(provider).resources if each.parent == "serve-app"]
    (way_in,) = [each for each in recorded(provider).resources if each.type == "pulumi:providers:kubernetes"]
    assert {each.name for each in below} <= set(way_in.dependencies)
    assert any(each.name == "serve-app-pool-gpusp" for each in below)
    before: set[str] = set()
    for resource in inside(provider):
        assert set(resource.dependencies) >= before | {way_in.name}
        before = {resource.name}
    kinds = [each.kind for each in inside(provider)]
    assert kinds.index("kubernetes.core.Namespace") < kinds.index(RELEASE)
    assert kinds[-1] == "kubernetes.ray.io.RayService"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_waits_for_secrets_is_not_waited_for_and_redis_is_emptied(provider: str) -> None:
    """Whether it is still there when the next one goes: KubeRay keeps a RayService until its job has run."""
    told = {
        each.kind: each.inputs["metadata"].get("annotations", {}) for each in inside(provider) if each.kind != RELEASE
    }
    assert told["kubernetes.apps.StatefulSet"]["pulumi.com/skipAwait"] == "true"
    assert told["kubernetes.core.Service"]["pulumi.com/skipAwait"] == "true"
    assert told["kubernetes.ray.io.RayService"] == {"pulumi.com/deletionPropagationPolicy": "background"}
    assert "pulumi.com/skipAwait" not in told["kubernetes.core.Namespace"], "it would not be waited for at its end"
    assert all(each.inputs["skipAwait"] for each in inside(provider) if each.kind == RELEASE)


TOKENS = {
    "aws": ["aws", "eks", "get-token", "--region", "us-west-2", "--cluster-name", "serve-app"],
    "gcp": ["gke-gcloud-auth-plugin"],
    "azure": ["kubelogin", "get-token", "--login", "azurecli", "--server-id", "6dae42f8-4368-4678-94ff-3960e28e3630"],
}
SERVERS = {
    "aws": "${serve-app-cluster.endpoint}",
    "gcp": "https://${serve-app-cluster.endpoint}",
    "azure": "https://${serve-app-cluster.privateFQDN}:443",
}
AUTHORITIES = {
    "aws": "${serve-app-cluster.certificateAuthority}",
    "gcp": "${serve-app-cluster.clusterCaCertificate}",
    "azure": "${cluster.certificateAuthority}",
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_way_in_is_a_program_and_no_secret(provider: str) -> None:
    (way_in,) = [each for each in recorded(provider).resources if each.type == "pulumi:providers:kubernetes"]
    told = json.loads(way_in.inputs["kubeconfig"])
    (user,) = told["users"]
    assert set(user["user"]) == {"exec"}
    assert [user["user"]["exec"]["command"], *user["user"]["exec"]["args"]] == TOKENS[provider]
    (cluster,) = told["clusters"]
    assert cluster["cluster"] == {"server": SERVERS[provider], "certificate-authority-data": AUTHORITIES[provider]}
    (context,) = told["contexts"]
    assert context["context"] == {"cluster": cluster["name"], "user": user["name"]}
    assert told["current-context"] == context["name"]
    assert way_in.inputs["clusterIdentifier"] == SERVERS[provider]


def test_on_azure_whoever_makes_the_cluster_administers_it() -> None:
    (grant,) = [each for each in recorded("azure").resources if each.name == "serve-app-creator"]
    assert grant.inputs["principalId"] == "${azure.caller}"
    assert grant.inputs["scope"] == "${serve-app-cluster.id}"
    assert grant.ignore_changes == ("principalId",), "the next one to deploy does not take it away"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_by_default_nothing_is_made_in_the_cluster(provider: str) -> None:
    made = evaluate(parse(document(provider))).resources
    assert [each.name for each in made if "kubernetes" in each.type.split(":")] == []


@pytest.mark.parametrize(
    ("provider", "image", "pulled"),
    [
        ("aws", "serve-app:0.1.0-cuda", "REG:0.1.0-cuda"),
        ("aws", "serve-app@sha256:" + "0" * 64, "REG@sha256:" + "0" * 64),
        ("gcp", "serve-app:0.1.0-cuda", "REG/serve-app:0.1.0-cuda"),
        ("azure", "team/serve-app:1", "REG/team/serve-app:1"),
        ("aws", "ghcr.io/team/serve-app:1", "ghcr.io/team/serve-app:1"),
        ("gcp", "registry:5000/serve-app:1", "registry:5000/serve-app:1"),
        ("azure", "localhost/serve-app:1", "localhost/serve-app:1"),
    ],
)
def test_an_image_without_a_registry_is_in_the_clusters(provider: str, image: str, pulled: str) -> None:
    assert image_in(parse(document(provider, serve={"image": image})), "REG") == pulled


# --- on the command line


@pytest.fixture
def described(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    pool = {"instance_types": [TYPES["aws"]]}
    told = {"provider": "aws", "gpu_pools": [pool], "addons": {"by_pulumi": True}, "serve": {"config": str(CONFIG)}}
    path.write_text(yaml.safe_dump(told))
    return path


def test_a_plan_lists_them(described: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--spec", str(described)]) == 0
    told = capsys.readouterr().out
    assert "kubernetes.helm.sh.Release" in told
    assert "kubernetes.ray.io.RayService" in told
    assert "deploy from inside the network, or name your address in network.api_cidrs" in told
    described.write_text(described.read_text() + "network: {api_cidrs: [203.0.113.7/32]}\n")
    assert main(["plan", "--spec", str(described)]) == 0
    assert "deploy from inside the network" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "policy", "deploy", "destroy"])
def test_without_the_package_it_says_how_to_get_it(
    command: str, described: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pulumi_kubernetes", None)
    assert main([command, "--spec", str(described)]) == 3
    said = capsys.readouterr().err
    assert said.startswith(
        "infra_pulumi: pulumi_kubernetes cannot be imported; in the repository: .venv/bin/pip install "
    )


def test_without_the_package_everything_else_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pulumi_kubernetes", None)
    assert main(["policy", "--provider", "aws", "--instance-type", TYPES["aws"]]) == 0
    main(["doctor"])
    assert "missing: for addons.by_pulumi; in the repository: .venv/bin/pip install " in capsys.readouterr().out


def test_a_deployment_is_the_planned_program(
    described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program that the Automation API is given, run as it would run it."""
    command = Command()
    programs = []
    opened = auto.create_or_select_stack

    def kept(**options: Any) -> Any:
        programs.append(options["program"])
        return opened(**options)

    monkeypatch.setattr(deploy, "find_command", lambda: command)
    monkeypatch.setattr(auto, "create_or_select_stack", kept)
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "a test's")
    assert main(["deploy", "--spec", str(described), "--state", str(tmp_path / "state"), "--yes"]) == 0
    assert "up" in command.verbs()
    assert [each.name for each in run(programs[0]).resources][-1] == "serve-app-rayservice-serve-app"


def run(made: Any) -> Recording:
    computed_outputs = importlib.import_module("infra_pulumi.aws").computed_outputs
    return record(made, "serve-app", RecordingMonitor(computed_outputs))


def test_the_program_for_pulumis_own_cli_finds_the_config_wherever_it_is_run(
    described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described.write_text(described.read_text().replace(str(CONFIG), CONFIG.name))
    monkeypatch.chdir(tmp_path)

    def main_of_the_stack() -> None:
        pulumi.runtime.set_all_config({"serve-app:spec": str(described)})
        program.main()

    assert [each.kind for each in run(main_of_the_stack).resources][-1] == "kubernetes.ray.io.RayService"


def test_a_config_that_is_none_is_a_fault_of_the_description(tmp_path: Path) -> None:
    wrong = document("gcp", addons={"by_pulumi": True}, serve={"config": tmp_path / "none.yaml"})
    with pytest.raises(SpecError, match=r"serve\.config: .*No such file"):
        evaluate(parse(wrong))
