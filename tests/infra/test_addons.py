"""Objects that Pulumi creates in the cluster: the rendered ones, in order, after the cluster, without secrets."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pulumi
import pytest
import yaml

from infra_pulumi import catalogue, deploy, program, render
from infra_pulumi.__main__ import main
from infra_pulumi.charts import charts
from infra_pulumi.objects import IDENTITY_ANNOTATION
from infra_pulumi.plan import evaluate
from infra_pulumi.rayservice import image_in
from infra_pulumi.record import Recording, RecordingMonitor, Resource, record
from infra_pulumi.spec import Provider, SpecError, load, parse
from tests.infra.helpers import CONFIG, TYPES, document, full, planned, recorded
from tests.infra.test_deploy import Command

pytestmark = pytest.mark.infra

PROVIDERS = get_args(Provider)
RELEASE = "kubernetes.helm.sh.Release"


def in_cluster(provider: str) -> list[Resource]:
    """The resources in the cluster, in creation order."""
    return [each for each in recorded(provider).resources if each.type.startswith("kubernetes:")]


def without_pulumi(inputs: dict[str, Any]) -> dict[str, Any]:
    """An object without the annotations for Pulumi and for the workers' cloud identity."""
    added = ("pulumi.com/", *IDENTITY_ANNOTATION.values())
    annotations = inputs["metadata"].get("annotations", {})
    kept = {key: value for key, value in annotations.items() if not key.startswith(added)}
    metadata = {key: value for key, value in inputs["metadata"].items() if key != "annotations"}
    return {**inputs, "metadata": {**metadata, "annotations": kept} if kept else metadata}


@cache
def manifests(provider: str) -> dict[str, str]:
    return render.manifests(full(provider), catalogue.load(), CONFIG)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_objects_equal_the_rendered_objects(provider: str) -> None:
    """The image has the cluster's registry, as kustomize writes it."""
    spec, files = full(provider), manifests(provider)
    image = image_in(spec, spec.serve.image, recorded(provider).outputs["registry"])
    texts = [files[name].replace(f"image: {spec.serve.image}\n", f"image: {image}\n") for name in files]
    documents = [each for text in texts for each in yaml.safe_load_all(text) if "metadata" in each]
    assert [without_pulumi(each.inputs) for each in in_cluster(provider) if each.kind != RELEASE] == documents
    assert f"image: {image}\n" in "".join(texts)


def test_workers_with_vllm_and_their_prepull_have_its_image_in_the_clusters_registry(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("applications: [{args: {models: [{name: m, engine: {kind: vllm}}]}}]")
    recording = planned(addons={"by_pulumi": True}, serve={"config": str(config)})
    registry = recording.outputs["registry"]
    (service,) = [each.inputs for each in recording.resources if each.kind == "kubernetes.ray.io.RayService"]
    (prepull,) = [each.inputs for each in recording.resources if each.kind == "kubernetes.apps.DaemonSet"]
    cluster = service["spec"]["rayClusterConfig"]
    (head, worker), (early,) = (
        [group["template"]["spec"]["containers"][0]["image"] for group in groups]
        for groups in ([cluster["headGroupSpec"], *cluster["workerGroupSpecs"]], [prepull["spec"]])
    )
    assert (head, worker) == (f"{registry}:0.1.0-cuda", f"{registry}:0.1.0-cuda-vllm")
    assert early == worker


def test_type_tokens_are_those_of_the_sdk() -> None:
    """Except RayService, which KubeRay's chart defines."""
    for _, module, kind in {tuple(each.type.split(":")) for each in in_cluster("aws")}:
        group, version = module.split("/")
        if group not in ("helm.sh", "ray.io"):
            sdk = importlib.import_module(f"pulumi_kubernetes.{group.partition('.')[0]}.{version}")
            assert f"'kubernetes:{module}:{kind}'" in inspect.getsource(getattr(sdk, kind))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_charts_equal_the_rendered_charts(provider: str) -> None:
    files = manifests(provider)
    values = [yaml.safe_load(text) for name, text in files.items() if name.startswith("values/")]
    releases = [each.inputs for each in in_cluster(provider) if each.kind == RELEASE]
    assert [each["values"] for each in releases] == values
    found = [(each["name"], each["chart"], each["version"], each["namespace"]) for each in releases]
    assert found == [(each.release, each.chart, each.version, each.namespace) for each in charts(full(provider))]
    assert [each["repositoryOpts"]["repo"] for each in releases] == [each.repository for each in charts(full(provider))]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_workers_service_account_has_the_cloud_identity(provider: str) -> None:
    (account,) = [each.inputs for each in in_cluster(provider) if each.kind == "kubernetes.core.ServiceAccount"]
    annotations = account["metadata"].get("annotations", {})
    key = IDENTITY_ANNOTATION.get(provider)
    assert annotations == ({key: recorded(provider).outputs["identity"]} if key else {})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_object_depends_on_the_previous_one_and_on_the_whole_cluster(provider: str) -> None:
    """Deletion is in reverse order: the service, then its operator, and the cluster last."""
    of_cluster = [each for each in recorded(provider).resources if each.parent == "serve-app"]
    (api,) = [each for each in recorded(provider).resources if each.type == "pulumi:providers:kubernetes"]
    assert {each.name for each in of_cluster} <= set(api.dependencies)
    assert any(each.name == "serve-app-pool-gpusp" for each in of_cluster)
    previous: set[str] = set()
    for resource in in_cluster(provider):
        assert set(resource.dependencies) >= previous | {api.name}
        previous = {resource.name}
    kinds = [each.kind for each in in_cluster(provider)]
    assert kinds.index("kubernetes.core.Namespace") < kinds.index(RELEASE)
    assert kinds[-1] == "kubernetes.ray.io.RayService"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pulumi_does_not_wait_for_pods_that_need_secrets_and_deletes_the_rayservice_in_background(
    provider: str,
) -> None:
    """KubeRay keeps a deleted RayService until its job has emptied Redis."""
    annotations = {
        each.kind: each.inputs["metadata"].get("annotations", {})
        for each in in_cluster(provider)
        if each.kind != RELEASE
    }
    assert annotations["kubernetes.apps.StatefulSet"]["pulumi.com/skipAwait"] == "true"
    assert annotations["kubernetes.core.Service"]["pulumi.com/skipAwait"] == "true"
    assert annotations["kubernetes.apps.DaemonSet"]["pulumi.com/skipAwait"] == "true"
    assert annotations["kubernetes.ray.io.RayService"] == {"pulumi.com/deletionPropagationPolicy": "background"}
    assert "pulumi.com/skipAwait" not in annotations["kubernetes.core.Namespace"], "its deletion must be awaited"
    assert all(each.inputs["skipAwait"] for each in in_cluster(provider) if each.kind == RELEASE)


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
def test_the_kubeconfig_has_a_token_program_and_no_secret(provider: str) -> None:
    (api,) = [each for each in recorded(provider).resources if each.type == "pulumi:providers:kubernetes"]
    kubeconfig = json.loads(api.inputs["kubeconfig"])
    (user,) = kubeconfig["users"]
    assert set(user["user"]) == {"exec"}
    assert [user["user"]["exec"]["command"], *user["user"]["exec"]["args"]] == TOKENS[provider]
    (cluster,) = kubeconfig["clusters"]
    assert cluster["cluster"] == {"server": SERVERS[provider], "certificate-authority-data": AUTHORITIES[provider]}
    (context,) = kubeconfig["contexts"]
    assert context["context"] == {"cluster": cluster["name"], "user": user["name"]}
    assert kubeconfig["current-context"] == context["name"]
    assert api.inputs["clusterIdentifier"] == SERVERS[provider]


def test_on_azure_the_creating_user_is_an_administrator() -> None:
    (grant,) = [each for each in recorded("azure").resources if each.name == "serve-app-creator"]
    assert grant.inputs["principalId"] == "${azure.caller}"
    assert grant.inputs["scope"] == "${serve-app-cluster.id}"
    assert grant.ignore_changes == ("principalId",), "a deployment by another user must not remove the grant"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_by_default_pulumi_creates_nothing_in_the_cluster(provider: str) -> None:
    assert [each.name for each in planned(provider).resources if "kubernetes" in each.type.split(":")] == []


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
def test_an_image_without_a_registry_gets_the_clusters_registry(provider: str, image: str, pulled: str) -> None:
    assert image_in(parse(document(provider)), image, "REG") == pulled


# --- command line


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    pool = {"instance_types": [TYPES["aws"]]}
    content = {"provider": "aws", "gpu_pools": [pool], "addons": {"by_pulumi": True}, "serve": {"config": str(CONFIG)}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_plan_lists_charts_and_the_rayservice(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--spec", str(spec_file)]) == 0
    output = capsys.readouterr().out
    assert "kubernetes.helm.sh.Release" in output
    assert "kubernetes.ray.io.RayService" in output
    assert "deploy from inside the network, or add your address to network.api_cidrs" in output
    spec_file.write_text(spec_file.read_text() + "network: {api_cidrs: [203.0.113.7/32]}\n")
    assert main(["plan", "--spec", str(spec_file)]) == 0
    assert "deploy from inside the network" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "policy", "deploy", "destroy"])
def test_without_pulumi_kubernetes_a_command_prints_how_to_install_it(
    command: str, spec_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pulumi_kubernetes", None)
    assert main([command, "--spec", str(spec_file)]) == 3
    assert capsys.readouterr().err.startswith(
        "infra_pulumi: cannot import pulumi_kubernetes; in the repository, run: .venv/bin/pip install "
    )


def test_without_pulumi_kubernetes_other_commands_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pulumi_kubernetes", None)
    assert main(["policy", "--provider", "aws", "--instance-type", TYPES["aws"]]) == 0
    main(["doctor"])
    assert "missing: for addons.by_pulumi; in the repository, run: .venv/bin/pip install " in capsys.readouterr().out


def test_a_deployment_runs_the_planned_program(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test runs the program that the Automation API gets."""
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "passphrase")
    location = deploy.StateLocation(tmp_path / "state")
    stack = deploy.open_stack(load(spec_file), catalogue.load(), location, Command())
    assert [each.name for each in run(stack.workspace.program).resources][-1] == "serve-app-rayservice-serve-app"


def run(stack_program: Any) -> Recording:
    computed_outputs = importlib.import_module("infra_pulumi.aws").computed_outputs
    return record(stack_program, "serve-app", RecordingMonitor(computed_outputs))


def test_the_program_for_pulumis_cli_finds_the_config_from_any_folder(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec_file.write_text(spec_file.read_text().replace(str(CONFIG), CONFIG.name))
    monkeypatch.chdir(tmp_path)

    def stack_main() -> None:
        pulumi.runtime.set_all_config({"serve-app:spec": str(spec_file)})
        program.main()

    assert [each.kind for each in run(stack_main).resources][-1] == "kubernetes.ray.io.RayService"


def test_a_missing_config_is_a_fault_of_the_description(tmp_path: Path) -> None:
    invalid = document("gcp", addons={"by_pulumi": True}, serve={"config": tmp_path / "none.yaml"})
    with pytest.raises(SpecError, match=r"serve\.config: .*No such file"):
        evaluate(parse(invalid))
