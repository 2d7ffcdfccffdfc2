"""Models with vLLM in a cluster: images, shared memory, cache volume and GPUs of the manifests, and `ray up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra_pulumi import render
from infra_pulumi.prepull import prepull_objects
from infra_pulumi.rayservice import CACHE_FOLDER, images, rayservice
from infra_pulumi.serve_config import VllmModel, cluster_config, read_config, vllm_models
from infra_pulumi.spec import SpecError
from tests.cluster.helpers import CATALOGUE, CONFIG, ROOT, Json, changed, description, documents
from tests.cluster.test_manifests import KUBERAY, pods, validate, with_name, worker
from tests.configs import gpu_examples, serve_document

PLAIN, WITH_VLLM = "serve-app:0.1.0-cuda", "serve-app:0.1.0-cuda-vllm"
# A pool with nodes for each example: one GPU, and eight GPUs of 40 GiB.
SMALL = {"name": "small", "instance_types": ["g5.xlarge"]}
LARGE = {"name": "large", "instance_types": ["p4d.24xlarge"], "max": 2}

# A machine of each cloud, and its GPUs. The catalogue has none of GCP with four.
MACHINES = {"aws": ("p4d.24xlarge", 8), "gcp": ("a2-highgpu-2g", 2), "azure": ("Standard_NC96ads_A100_v4", 4)}


def served(*models: dict[str, Any]) -> Json:
    """A Ray Serve config with these models."""
    usual = {"name": "m", "source": "a/b", "deployment": {"num_replicas": 1}}
    return serve_document(args={"models": [{**usual, **model} for model in models]})


def vllm(tensor: int = 1, pipeline: int = 1, **model: Any) -> dict[str, Any]:
    return {"engine": {"kind": "vllm", "tensor_parallel": tensor, "pipeline_parallel": pipeline}, **model}


def images_of(document: Json) -> list[str]:
    """The image of the head and of each worker group."""
    return [template["spec"]["containers"][0]["image"] for template in pods(document)]


def shared_memory(template: Json) -> str:
    volumes = {each["name"]: each["emptyDir"] for each in template["spec"]["volumes"]}
    assert volumes["shared-mem"]["medium"] == "Memory"
    return str(volumes["shared-mem"]["sizeLimit"])


@pytest.mark.parametrize(
    ("cloud", "machine", "models"),
    [
        pytest.param(cloud, machine, models, id=f"{cloud}-{models[0]['name']}")
        for cloud, (machine, gpus) in MACHINES.items()
        for models in gpu_examples()
        if models[0]["resources"]["num_gpus"] <= gpus
    ],
)
def test_the_examples_in_the_deploy_page_are_rendered_and_match_the_schemas(
    cloud: str, machine: str, models: list[Json], tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(serve_document(args={"models": models})))
    files = render.manifests(changed(cloud, pool={"instance_types": [machine]}), CATALOGUE, path)
    (service,) = yaml.safe_load_all(files["rayservice.yaml"])
    jsonschema.validate(service, KUBERAY["schema"])
    for template in pods(service):
        validate({"apiVersion": "v1", "kind": "Pod", **with_name(template)})
    for document in yaml.safe_load_all(files["prepull.yaml"]):
        validate(document)
    uses_vllm = any(model["engine"].get("kind") == "vllm" for model in models)
    assert images_of(service) == [PLAIN, WITH_VLLM if uses_vllm else PLAIN]


def test_only_pools_on_which_a_replica_with_vllm_fits_have_its_image() -> None:
    spec = changed("aws", gpu_pools=[SMALL, LARGE])
    of_one = rayservice(spec, CATALOGUE, served(vllm()))
    assert images_of(of_one) == [PLAIN, WITH_VLLM, WITH_VLLM]
    of_four = rayservice(spec, CATALOGUE, served(vllm(4), {"name": "n"}))
    assert images_of(of_four) == [PLAIN, PLAIN, WITH_VLLM]
    _, small, large = pods(of_four)
    assert shared_memory(small) == "2Gi"
    assert shared_memory(large) == "18Gi", "2 GiB for Ray, and 2 for each of eight GPUs"
    mounts = {each["name"]: each["mountPath"] for each in large["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {"shared-mem": "/dev/shm", "ray-logs": "/tmp/ray", "cache": CACHE_FOLDER}
    assert "cache" not in {each["name"] for each in small["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("engine", "model", "expected"),
    [
        ({}, {}, False),
        ({"kind": "native"}, {}, False),
        ({"kind": "vllm"}, {}, True),
        ({"kind": "auto"}, {}, True),
        ({"kind": "auto"}, {"device": "cpu"}, False),
        ({"kind": "auto"}, {"embeddings": True}, False),
    ],
)
def test_a_model_has_vllm_if_its_kind_takes_it_on_a_gpu(
    engine: dict[str, Any], model: dict[str, Any], expected: bool
) -> None:
    config = served({"engine": engine, **model})
    assert bool(vllm_models(config)) == expected
    assert (WITH_VLLM in images_of(rayservice(description("aws"), CATALOGUE, config))) == expected


def test_a_model_with_vllm_reserves_the_gpus_of_a_replica() -> None:
    spec = changed("aws", gpu_pools=[SMALL, LARGE])
    config = cluster_config(spec, CATALOGUE, served(vllm(2, 2, deployment={})))
    (model,) = config["applications"][0]["args"]["models"]
    assert model["resources"] == {"num_gpus": 4}
    assert model["device"] == "cuda"
    assert model["deployment"]["autoscaling"]["max_replicas"] == 4, "two on each of two nodes, none on single GPUs"
    assert vllm_models(config) == (VllmModel("m", 4, 4, False),)


def test_a_replica_on_several_nodes_counts_once() -> None:
    spec = changed("aws", gpu_pools=[{**LARGE, "max": 5}])
    config = cluster_config(spec, CATALOGUE, served(vllm(8, 2, resources={"num_gpus": 8}, deployment={})))
    (model,) = config["applications"][0]["args"]["models"]
    assert model["resources"] == {"num_gpus": 8}
    assert model["deployment"]["autoscaling"]["max_replicas"] == 2, "five nodes, two for each replica"
    assert images_of(rayservice(spec, CATALOGUE, config)) == [PLAIN, WITH_VLLM]


def test_a_replica_with_more_gpus_than_a_node_is_refused_with_a_remedy() -> None:
    message = "m reserves 4 GPUs on one node, but a node has at most 1: .* set resources.num_gpus to 1"
    with pytest.raises(SpecError, match=message):
        rayservice(description("aws"), CATALOGUE, served(vllm(4)))


def test_both_images_get_the_registry_and_keep_their_tags() -> None:
    found = images(description("aws"), "registry.host/serve-app")
    assert (found.service, found.vllm) == (
        "registry.host/serve-app:0.1.0-cuda",
        "registry.host/serve-app:0.1.0-cuda-vllm",
    )


def test_the_kustomization_replaces_the_name_of_both_images_and_keeps_their_tags(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(served(vllm())))

    def replacements(**serve: str) -> Json:
        files = render.manifests(changed("aws", serve=serve), CATALOGUE, path)
        return yaml.safe_load(files["kustomization.yaml"])["images"]

    assert replacements() == [{"name": "serve-app", "newName": "serve-app"}]
    assert replacements(vllm_image="other/app:1") == [
        {"name": "serve-app", "newName": "serve-app", "newTag": "0.1.0-cuda"},
        {"name": "other/app", "newName": "other/app", "newTag": "1"},
    ]


def test_a_pod_on_each_gpu_node_pulls_the_image_of_the_workers() -> None:
    spec = changed("aws", gpu_pools=[SMALL, {**LARGE, "taints": [{"key": "team"}]}])
    config = served(vllm(4))
    service = rayservice(spec, CATALOGUE, config)
    sets = prepull_objects(spec, CATALOGUE, config, images(spec))
    templates = [each["spec"]["template"] for each in sets]
    assert [each["spec"]["containers"][0]["image"] for each in templates] == images_of(service)[1:]
    for template, of_worker in zip(templates, list(pods(service))[1:], strict=True):
        assert template["spec"]["nodeSelector"] == of_worker["spec"]["nodeSelector"]
        assert template["spec"]["tolerations"] == of_worker["spec"]["tolerations"]
    assert all("serve-app/ray" not in template["metadata"]["labels"] for template in templates), "no pod of Ray"
    assert len({each["metadata"]["name"] for each in sets}) == 2


def test_without_the_prepull_no_file_has_it() -> None:
    files = render.manifests(changed("aws", addons={"image_prepull": False}), CATALOGUE, CONFIG)
    assert "prepull.yaml" not in files
    assert yaml.safe_load(files["kustomization.yaml"])["resources"] == ["namespace.yaml", "rayservice.yaml"]


@pytest.mark.parametrize(("models", "lock"), [(vllm(), "requirements-vllm-cuda.lock"), ({}, "requirements.lock")])
def test_ray_up_installs_the_packages_that_the_models_need(models: dict[str, Any], lock: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(served(models)))
    files = render.ray_up(description("aws"), CATALOGUE, path, Path("rendered"))
    for name in ("aws.yaml", "on-premises.yaml"):
        document = yaml.safe_load(files[name])
        assert document["file_mounts"][f"~/serve_app/{lock}"] == lock
        (install,) = [each for each in document["setup_commands"] if ".lock" in each]
        assert install.endswith(f"-r ~/serve_app/{lock}")
        assert ("--no-deps" in install) == ("vllm" in lock)
        assert (ROOT / lock).exists()


@pytest.mark.parametrize("engine", ["{kind: vlm}", "{tensor_parallel: 0}", "{tensor_parallel: '2'}"])
def test_an_invalid_engine_is_refused_with_its_path(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(f"applications: [{{args: {{models: [{{engine: {engine}}}]}}}}]")
    with pytest.raises(SpecError, match=r"applications\.0\.args\.models\.0\.engine\.(kind|tensor_parallel)"):
        read_config(path)


def test_the_shipped_example_has_one_image() -> None:
    assert worker(documents("aws", "kubernetes/rayservice.yaml")[0])["spec"]["containers"][0]["image"] == PLAIN
