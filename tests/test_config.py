"""The configuration tree: bounds, defaults and the rules between its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import (
    AppConfig,
    Model,
    Section,
    cache_dir,
    deployment_name,
    describe,
    template_path,
)
from tests.configs import DEPLOYMENT, MODEL, SHIPPED, app_args

ROOT = Path(__file__).parents[1]
SCALED = {**DEPLOYMENT, "num_replicas": None}

# Every number of the tree, with the nearest values outside of its bounds.
DEPLOYMENT_BOUNDS: dict[str, list[float]] = {
    "max_ongoing_requests": [0],
    "max_queued_requests": [0],
    "num_replicas": [0],
    "autoscaling.min_replicas": [-1],
    "autoscaling.max_replicas": [0],
    "autoscaling.target_ongoing_requests": [0],
    "autoscaling.upscale_delay_s": [-0.1],
    "autoscaling.downscale_delay_s": [-0.1],
    "autoscaling.downscale_to_zero_delay_s": [-0.1],
    "autoscaling.look_back_period_s": [10],
    "health_check_period_s": [0],
    "health_check_timeout_s": [0],
    "graceful_shutdown_wait_loop_s": [0],
    "graceful_shutdown_timeout_s": [-0.1],
    "max_surge_percent": [-1],
}
BOUNDS: dict[str, list[float]] = {
    **{f"ingress.deployment.{name}": values for name, values in DEPLOYMENT_BOUNDS.items()},
    **{f"models.0.deployment.{name}": values for name, values in DEPLOYMENT_BOUNDS.items()},
    "ingress.num_cpus": [-0.1],
    "limits.max_body_bytes": [1023],
    "limits.max_batch_items": [0],
    "limits.request_timeout_s": [0],
    "limits.warm_wait_s": [0],
    "limits.heartbeat_s": [0, 10.1],
    "limits.upload_timeout_s": [0],
    "limits.stalled_client_s": [0],
    "cors.max_age_s": [-1],
    "responses.max_stored": [-1],
    "responses.max_stored_bytes": [1023],
    "responses.ttl_s": [0],
    "telemetry.tracing.sampling_ratio": [-0.1, 1.1],
    "models.0.sampling_defaults.temperature": [-0.1, 2.1],
    "models.0.sampling_defaults.top_p": [0, 1.1],
    "models.0.resources.num_cpus": [-0.1],
    "models.0.resources.num_gpus": [-0.1],
    "models.0.batching.max_batch_size": [0],
    "models.0.batching.batch_wait_timeout_s": [-0.1, 1.1],
    "models.0.engine.max_running": [0, 1025],
    "models.0.engine.max_waiting": [0],
    "models.0.engine.max_context": [15],
    "models.0.engine.max_step_tokens": [0],
    "models.0.engine.draft_tokens": [-1, 8],
    "models.0.engine.kv_memory_fraction": [0, 0.96],
    "models.0.engine.kv_memory_bytes": [0],
    "models.0.engine.flush_interval_s": [-0.1, 0.6],
    "models.0.engine.threads": [0],
}
SECTIONS = sorted({path.rpartition(".")[0] for path in BOUNDS} | {"", "models.0"})


def with_value(path: str, value: object) -> dict[str, Any]:
    """Valid args but for the value at `path`."""
    document = app_args()
    *parents, last = path.split(".")
    section: Any = document
    for part in parents:
        section = section[int(part)] if part.isdigit() else section.setdefault(part, {})
    section[last] = value
    return document


def numbers(section: type[Section], path: str = "") -> Iterator[str]:
    """The path of every number below a section."""
    for name, field in section.model_fields.items():
        at = f"{path}{name}" + (".0" if name == "models" else "")
        for kind in get_args(field.annotation) or (field.annotation,):
            if kind in (int, float):
                yield at
            elif isinstance(kind, type) and issubclass(kind, Section):
                yield from numbers(kind, f"{at}.")


def shipped_config() -> AppConfig:
    (application,) = yaml.safe_load(SHIPPED.read_text())["applications"]
    return AppConfig.model_validate(application["args"])


def choices(key: str) -> str:
    """The values of a model's key, as pydantic lists them."""
    *values, last = [f"'{value}'" for value in get_args(Model.model_fields[key].annotation)]
    return f"{', '.join(values)} or {last}"


def fault(document: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        AppConfig.model_validate(document)
    (only,) = describe(error.value).splitlines()
    return only.removeprefix("  ")


def test_the_shipped_file_reserves_no_gpu_and_trusts_no_code() -> None:
    (model,) = shipped_config().models
    assert (model.source, model.resources.num_gpus, model.device) == ("builtin:smollm2-135m", 0, "auto")
    assert not model.trust_remote_code


def deployments_in(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    for child in node.value if isinstance(node, yaml.SequenceNode) else ():
        yield from deployments_in(child)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "deployment":
            yield value
        yield from deployments_in(value)


def lines_of(node: yaml.MappingNode) -> Iterator[int]:
    """The line of every key that has a value of its own."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from lines_of(value)
        else:
            yield key.start_mark.line


def test_every_deployment_of_the_shipped_file_sets_its_limits() -> None:
    (application,) = yaml.safe_load(SHIPPED.read_text())["applications"]
    required = {"max_ongoing_requests", "max_queued_requests", "health_check_period_s", "health_check_timeout_s"}
    required |= {"graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s", "max_surge_percent"}
    for owner in (application["args"]["ingress"], *application["args"]["models"]):
        assert required - set(owner["deployment"]) == set()
        assert ("num_replicas" in owner["deployment"]) != ("autoscaling" in owner["deployment"])


def test_every_number_of_a_deployment_in_the_shipped_file_has_a_comment() -> None:
    text = SHIPPED.read_text()
    deployments = list(deployments_in(yaml.compose(text)))
    assert len(deployments) == 1 + len(shipped_config().models)
    lines = [text.splitlines()[number] for deployment in deployments for number in lines_of(deployment)]
    assert [line for line in lines if not re.search(r" # \w", line)] == []


def test_the_gpu_example_in_the_deploy_page_is_a_valid_model() -> None:
    _, _, chapter = (ROOT / "docs/deploy.md").read_text().partition("\n## A model on GPUs\n")
    (block,) = re.findall(r"```yaml\n(.*?)```", chapter.split("\n## ")[0], re.DOTALL)
    (model,) = [Model.model_validate(entry) for entry in yaml.safe_load(block)]
    assert model.resources.num_gpus == 1
    assert model.deployment.max_surge_percent == 100


def test_args_need_only_models() -> None:
    config = AppConfig.model_validate({"models": [MODEL]})
    assert config.limits.request_timeout_s == 600
    assert (config.telemetry.tracing, config.telemetry.log_format) == (None, "text")
    assert fault({}) == "models: Field required"


def test_the_default_ingress_is_one_replica_without_a_cpu() -> None:
    ingress = AppConfig.model_validate({"models": [MODEL]}).ingress
    assert ingress.num_cpus == 0
    deployment = ingress.deployment
    assert (deployment.num_replicas, deployment.autoscaling) == (1, None)
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (1024, 256)
    assert not deployment.scales_to_zero


@pytest.mark.parametrize("value", [True, False, None])
def test_fused_is_refused(value: object) -> None:
    message = "ingress: fused was removed; an ingress always runs in front of the models: remove the key"
    assert fault(with_value("ingress.fused", value)) == message


def test_a_faulty_model_is_not_reported_as_missing_too() -> None:
    assert fault(with_value("models.0.source", "")).startswith("models.0.source: ")


@pytest.mark.parametrize("source", [None, "builtin:chatml_tools", "/some/where.jinja", "~/mine.jinja"])
def test_a_chat_template_is_a_path_or_a_builtin_one(source: str | None) -> None:
    (model,) = AppConfig(**app_args(chat_template=source)).models
    assert model.chat_template == source


@pytest.mark.parametrize("source", ["builtin:", "builtin:other", "builtin:../templates/chatml_tools", "builtin:/etc/x"])
def test_an_unknown_builtin_chat_template_is_refused_with_the_known_ones(source: str) -> None:
    message = fault(app_args(chat_template=source))
    assert message.startswith("models.0.chat_template: ")
    assert message.endswith("one of builtin:chatml_tools")


def test_a_builtin_chat_template_is_a_file_of_the_package() -> None:
    assert template_path("builtin:chatml_tools").read_text().startswith("{#")
    assert template_path("~/mine.jinja") == Path.home() / "mine.jinja"


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_refused_in_every_section(section: str) -> None:
    path = f"{section}.sauce".removeprefix(".")
    document = with_value(path, 1)
    if section.endswith("autoscaling"):
        deployment = document["ingress"] if section.startswith("ingress") else document["models"][0]
        deployment["deployment"]["num_replicas"] = None
    assert fault(document) == f"{path}: Extra inputs are not permitted"


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BOUNDS.items() for value in values])
def test_a_number_outside_of_its_bounds_is_refused(path: str, value: float) -> None:
    assert re.match(rf"{re.escape(path)}: Input should be (greater|less) than ", fault(with_value(path, value)))


def test_every_number_has_bounds() -> None:
    assert sorted(numbers(AppConfig)) == sorted(BOUNDS)


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "http://", "grpc://localhost:4317", "http:///v1/traces"])
def test_the_endpoint_of_a_collector_is_an_http_url(endpoint: str) -> None:
    assert fault(with_value("telemetry.tracing.endpoint", endpoint)).startswith("telemetry.tracing.endpoint: ")


@pytest.mark.parametrize(
    ("telemetry", "message"),
    [
        ({"tracing": {"headers": {"api-key": "x"}}}, "telemetry.tracing.headers: Extra inputs are not permitted"),
        ({"log_format": "yaml"}, "telemetry.log_format: Input should be 'text' or 'json'"),
    ],
)
def test_unknown_telemetry_is_refused(telemetry: dict[str, object], message: str) -> None:
    assert fault({**app_args(), "telemetry": telemetry}) == message


def test_tracing_samples_one_percent_without_contents_by_default() -> None:
    tracing = AppConfig(**app_args(), telemetry={"tracing": {}}).telemetry.tracing
    assert tracing is not None
    assert (tracing.sampling_ratio, tracing.capture_content) == (0.01, False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"batching": {"max_batch_size": 33}}, "models.0: batching.max_batch_size 33 must not exceed deployment.max"),
        (
            {"resources": {"num_gpus": 1.5}},
            "models.0.resources.num_gpus: 1.5 is neither a fraction of one GPU",
        ),
        ({"device": "cuda"}, "models.0: device: cuda needs resources.num_gpus above 0"),
        ({"name": "-x"}, "models.0.name: String should match pattern"),
        ({"name": "x\n"}, "models.0.name: String should match pattern"),
        ({"name": ""}, "models.0.name: String should have at least 1 character"),
        ({"source": ""}, "models.0.source: String should have at least 1 character"),
        ({"dtype": "int3"}, "models.0.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"quantization": "int3"}, f"models.0.quantization: Input should be {choices('quantization')}"),
        ({"device": "tpu"}, "models.0.device: Input should be 'auto', 'cpu' or 'cuda'"),
        ({"deployment": None}, "models.0.deployment: Input should be a valid dictionary"),
    ],
    ids=str,
)
def test_an_unusable_model_is_refused(model: dict[str, Any], message: str) -> None:
    assert fault(app_args(**model)).startswith(message)


def test_a_full_batch_and_a_fraction_of_a_gpu_are_valid() -> None:
    document = app_args(batching={"max_batch_size": 32}, device="cuda", resources={"num_gpus": 0.5})
    assert AppConfig.model_validate(document).models[0].resources.num_gpus == 0.5


@pytest.mark.parametrize("owner", ["ingress", "models.0"])
@pytest.mark.parametrize("deployment", [SCALED, {**DEPLOYMENT, "autoscaling": {}}], ids=["neither", "both"])
def test_a_deployment_has_a_number_of_replicas_or_autoscaling(owner: str, deployment: dict[str, Any]) -> None:
    message = f"{owner}.deployment: set exactly one of num_replicas and autoscaling"
    assert fault(with_value(f"{owner}.deployment", deployment)) == message


@pytest.mark.parametrize(("scaling", "to_zero"), [({"min_replicas": 0}, True), ({"min_replicas": 1}, False)])
def test_a_deployment_with_no_minimum_scales_to_zero(scaling: dict[str, int], to_zero: bool) -> None:
    config = AppConfig.model_validate(app_args(deployment={**SCALED, "autoscaling": scaling}))
    assert config.models[0].deployment.scales_to_zero is to_zero


@pytest.mark.parametrize("owner", ["ingress", "models.0"])
@pytest.mark.parametrize("target", [32, 33])
def test_a_target_that_ray_never_exceeds_is_refused(owner: str, target: float) -> None:
    scaling = {"max_replicas": 2, "target_ongoing_requests": target}
    assert fault(with_value(f"{owner}.deployment", {**SCALED, "autoscaling": scaling})) == (
        f"{owner}.deployment: autoscaling.target_ongoing_requests {target} must be below max_ongoing_requests 32: "
        "otherwise Ray never adds a replica"
    )


@pytest.mark.parametrize("scaling", [{"max_replicas": 2, "target_ongoing_requests": 31.5}, {"max_replicas": 1}])
def test_a_target_below_max_ongoing_requests_or_for_one_replica_is_valid(scaling: dict[str, float]) -> None:
    document = with_value("models.0.deployment", {**SCALED, "autoscaling": scaling})
    (model,) = AppConfig.model_validate(document).models
    assert model.deployment.max_ongoing_requests == 32


def test_the_minimum_of_replicas_is_not_above_the_maximum() -> None:
    message = fault(app_args(deployment={**SCALED, "autoscaling": {"min_replicas": 3, "max_replicas": 2}}))
    assert message.startswith("models.0.deployment.autoscaling: ")
    assert message.endswith("min_replicas 3 is above max_replicas 2")


@pytest.mark.parametrize(("one", "other"), [("a/b", "a:b"), ("a/b", "a-b"), ("same", "same")])
def test_two_models_with_the_same_deployment_are_refused(one: str, other: str) -> None:
    document = {**app_args(), "models": [{**MODEL, "name": name} for name in (one, "m", other)]}
    message = f"several models have the deployment {deployment_name(one)}: rename them"
    assert fault(document) == f"(top): {message}"


def test_similar_model_names_with_different_deployments_are_valid() -> None:
    names = ["a/b", "a.b", "a_b", "A/B"]
    config = AppConfig.model_validate({**app_args(), "models": [{**MODEL, "name": name} for name in names]})
    assert [model.name for model in config.models] == names


@pytest.mark.parametrize(
    ("name", "deployment"),
    [("org/Model-1.5_x:q4", "model-org-Model-1.5_x-q4"), ("m", "model-m"), ("a//b", "model-a--b")],
)
def test_a_deployment_name_replaces_the_characters_that_ray_refuses(name: str, deployment: str) -> None:
    assert deployment_name(name) == deployment


def test_a_configuration_without_a_model_is_refused() -> None:
    assert fault({**app_args(), "models": []}).startswith("models: Tuple should have at least 1 item")


def test_the_configuration_is_immutable() -> None:
    config = AppConfig.model_validate(app_args())
    with pytest.raises(ValidationError):
        config.limits.request_timeout_s = 1  # type: ignore[misc]


def test_the_cache_folder_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "serve_app"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache/serve_app"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/serve_app"
