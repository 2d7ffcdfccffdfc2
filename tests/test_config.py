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
    KINDS,
    AppConfig,
    ConfigError,
    Model,
    NativeOptions,
    Section,
    cache_dir,
    deployment_name,
    describe,
    template_path,
)
from tests.configs import DEPLOYMENT, MODEL, SHIPPED, app_args, gpu_examples, kind_of, members

ROOT = Path(__file__).parents[1]
SCALED = {**DEPLOYMENT, "num_replicas": None}

# Every number of the tree, with the nearest values outside of its bounds.
DEPLOYMENT_BOUNDS: dict[str, list[float]] = {
    "max_ongoing_requests": [0],
    "max_queued_requests": [0],
    "num_replicas": [0],
    "autoscaling.min_replicas": [-1],
    "autoscaling.max_replicas": [0],
    "autoscaling.target_ttft_s": [0],
    "autoscaling.min_idle": [-1],
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
    "max_replicas_per_node": [0, 101],
}
ENGINE_BOUNDS: dict[str, list[float]] = {
    "max_running": [0, 1025],
    "max_waiting": [0],
    "max_context": [15],
    "flush_interval_s": [-0.1, 0.6],
}
OWN_BOUNDS: dict[str, dict[str, list[float]]] = {
    "native": {
        "max_step_tokens": [0],
        "draft_tokens": [-1, 8],
        "kv_memory_fraction": [0, 0.96],
        "kv_memory_bytes": [0],
        "threads": [0],
    },
    "vllm": {
        "max_running": [0, 4097],
        "max_step_tokens": [0],
        "gpu_memory_utilization": [0, 1.1],
        "kv_memory_bytes": [0],
        "tensor_parallel": [0],
        "pipeline_parallel": [0],
        "speculative.tokens": [0, 17],
    },
    "auto": {},
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
    "batches.lines_in_flight": [0, 1025],
    "batches.max_file_bytes": [1023],
    "batches.max_lines": [0],
    "batches.max_open_batches": [0],
    "batches.max_tenant_bytes": [1023],
    "batches.retention_s": [3599],
    "idempotency.max_kept": [-1],
    "idempotency.max_kept_bytes": [1023],
    "idempotency.ttl_s": [0],
    "response_cache.max_bytes": [1023],
    "response_cache.max_answer_bytes": [1023],
    "response_cache.ttl_s": [0],
    "response_cache.timeout_s": [0, 1.1],
    "auth.refresh_s": [0, 61],
    "auth.max_stale_s": [59],
    "auth.oidc.leeway_s": [-0.1, 301],
    "auth.oidc.refresh_s": [0.9, 86_401],
    "database.timeout_s": [0, 61],
    "quotas.timeout_s": [0, 5.1],
    "quotas.lease_s": [2.9, 601],
    "quotas.default_max_tokens": [0],
    "quotas.flush_s": [0, 61],
    "models.0.price.input_per_million": [-0.1, 100_001],
    "models.0.price.cached_input_per_million": [-0.1, 100_001],
    "models.0.price.output_per_million": [-0.1, 100_001],
    "telemetry.tracing.sampling_ratio": [-0.1, 1.1],
    "models.0.sampling_defaults.temperature": [-0.1, 2.1],
    "models.0.sampling_defaults.top_p": [0, 1.1],
    "models.0.lora.max_loaded": [0, 1025],
    "models.0.resources.num_cpus": [-0.1],
    "models.0.resources.num_gpus": [-0.1],
    "models.0.batching.max_batch_size": [0],
    "models.0.batching.batch_wait_timeout_s": [-0.1, 1.1],
    **{
        f"models.0.engine[{kind}].{name}": values
        for kind in KINDS
        for name, values in ({**ENGINE_BOUNDS, **OWN_BOUNDS[kind]}).items()
    },
}
SECTIONS = sorted({path.rpartition(".")[0] for path in BOUNDS} | {"", "models.0"})


# Keys without which a section is not valid.
REQUIRED = {"oidc": {"issuer": "https://i/", "audience": "a", "jwks_url": "https://i/keys"}}


def with_value(path: str, value: object) -> dict[str, Any]:
    """Valid args but for the value at `path`, in which `engine[vllm]` is a section `engine` with `kind: vllm`."""
    document = app_args()
    *parents, last = path.split(".")
    section: Any = document
    for part in parents:
        name, _, kind = part.rstrip("]").partition("[")
        empty = {"kind": kind} if kind else dict(REQUIRED.get(name, {}))
        section = section[int(name)] if name.isdigit() else section.setdefault(name, empty)
    section[last] = value
    return document


def in_file(path: str) -> str:
    """The path as messages have it."""
    return re.sub(r"\[\w+\]", "", path)


def numbers(section: type[Section], path: str = "") -> Iterator[str]:
    """The path of every number below a section."""
    for name, field in section.model_fields.items():
        at = f"{path}{name}" + (".0" if name == "models" else "")
        for member in (found for kind in members(field.annotation) for found in get_args(kind) or (kind,)):
            if member in (int, float):
                yield at
            elif isinstance(member, type) and issubclass(member, Section):
                yield from numbers(member, f"{at}[{kind_of(member)}].".replace("[]", ""))


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


def test_the_gpu_examples_in_the_deploy_page_are_valid_models() -> None:
    models = [model for block in gpu_examples() for model in AppConfig.model_validate({"models": block}).models]
    one, four, beside, on_cpu, native = models
    assert [model.engine.kind for model in models] == ["vllm", "vllm", "vllm", "native", "native"]
    assert (one.vllm_options.gpus, one.resources.num_gpus) == (1, 1)
    assert (four.vllm_options.gpus, four.resources.num_gpus, four.vllm_options.quantization) == (4, 4, "fp8")
    assert (beside.resources.num_gpus, on_cpu.resources.num_gpus, on_cpu.device) == (1, 0, "cpu")
    assert four.deployment.max_surge_percent == native.deployment.max_surge_percent == 0
    assert native.resources.num_gpus == 0.5


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


def test_the_names_of_adapters_and_models_differ() -> None:
    adapters = [{"name": name, "source": "/a"} for name in ("a", "m", "a")]
    assert fault(app_args(lora={"adapters": adapters})).endswith("must differ, but a, m occurs twice")


@pytest.mark.parametrize("source", ["adapters", "owner/name", "./adapters", "owner/name@", "https://x/y@z"])
def test_what_may_be_loaded_is_an_absolute_path_or_a_hub_id_with_its_revision(source: str) -> None:
    assert "is neither an absolute path nor a hub id with its revision" in fault(app_args(lora={"allow": [source]}))
    AppConfig(**app_args(lora={"allow": ["/adapters", "~/adapters", "owner/name@main"]}))


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_refused_in_every_section(section: str) -> None:
    path = f"{section}.sauce".removeprefix(".")
    document = with_value(path, 1)
    if section.endswith("autoscaling"):
        deployment = document["ingress"] if section.startswith("ingress") else document["models"][0]
        deployment["deployment"]["num_replicas"] = None
    assert fault(document) == f"{in_file(path)}: Extra inputs are not permitted"


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BOUNDS.items() for value in values])
def test_a_number_outside_of_its_bounds_is_refused(path: str, value: float) -> None:
    assert re.match(
        rf"{re.escape(in_file(path))}: Input should be (greater|less) than ", fault(with_value(path, value))
    )


def test_every_number_has_bounds() -> None:
    assert sorted(numbers(AppConfig)) == sorted(BOUNDS)


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://cache", "redis://", "redis:///0", "valkey://cache"])
def test_the_server_of_the_response_cache_has_a_redis_url(url: str) -> None:
    assert fault(with_value("response_cache.url", url)).startswith("response_cache.url: ")


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("response_cache.url", "redis://:s3cret@cache:6379"),
        ("quotas.url", "redis://:s3cret@limits:6379"),
        ("response_cache.url", "rediss://me:s3cret@cache"),
        ("response_cache.url", "redis://c?password=s3cret"),
        ("database.url", "postgresql+psycopg://me:s3cret@db/serve"),
        ("database.url", "postgresql://db/serve?user=me&password=s3cret"),
    ],
)
def test_a_password_in_the_configuration_is_refused_and_not_repeated(key: str, url: str) -> None:
    message = fault(with_value(key, url))
    assert message.startswith(f"{key}: the URL has a password; set it in the environment variable ")
    assert "s3cret" not in message


@pytest.mark.parametrize("url", ["http://login.example.com/keys", "http://127.0.0.1.example.com/", "ftp://i/", "x"])
def test_the_keys_of_an_identity_provider_come_by_https(url: str) -> None:
    assert fault(with_value("auth.oidc.jwks_url", url)).startswith("auth.oidc.jwks_url: ")
    AppConfig(**with_value("auth.oidc.jwks_url", "http://127.0.0.1:8080/keys"))


@pytest.mark.parametrize("name", ["none", "HS256", "rs256"])
def test_algorithms_that_do_not_prove_the_provider_are_refused(name: str) -> None:
    assert fault(with_value("auth.oidc.algorithms", [name])).startswith("auth.oidc.algorithms.0: ")


def test_everyone_and_tokens_exclude_each_other() -> None:
    message = fault({**app_args(), "auth": {"allow_anonymous": True, "oidc": REQUIRED["oidc"]}})
    assert message.startswith("auth: allow_anonymous serves requests without any token")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "", "localhost.example.com"])
def test_a_service_without_keys_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(ConfigError, match=r"without authentication\. Set `auth: {}` to demand API keys"):
        AppConfig(**app_args()).check_address(host)
    for auth in ({}, {"allow_anonymous": True}):
        AppConfig(**app_args(), auth=auth).check_address(host)
    for loopback in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        AppConfig(**app_args()).check_address(loopback)


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


@pytest.mark.parametrize("key", ["target_ttft_s", "min_idle"])
def test_the_objective_of_ray_and_that_of_the_service_exclude_each_other(key: str) -> None:
    scaling = {"target_ongoing_requests": 8, key: 1}
    message = fault(app_args(deployment={**SCALED, "autoscaling": scaling}))
    assert message.endswith(f"{key} and target_ongoing_requests exclude each other: remove one of them")


def test_more_idle_replicas_than_the_maximum_are_refused() -> None:
    message = fault(app_args(deployment={**SCALED, "autoscaling": {"min_idle": 3, "max_replicas": 2}}))
    assert message.endswith("min_idle 3 is above max_replicas 2")


def test_a_model_with_replicas_that_are_kept_ready_never_scales_to_zero() -> None:
    scaling = {"min_replicas": 0, "min_idle": 1}
    config = AppConfig.model_validate(app_args(deployment={**SCALED, "autoscaling": scaling}))
    assert not config.models[0].deployment.scales_to_zero


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


# Engines


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_has_the_kind_of_its_section(kind: str) -> None:
    (model,) = AppConfig(**app_args(source="a/b", engine={"kind": kind})).models
    assert model.engine.kind == kind


def test_a_section_without_a_kind_is_the_native_engine() -> None:
    (model,) = AppConfig(**app_args(engine={"max_running": 8})).models
    assert isinstance(model.engine, NativeOptions)
    assert model.engine.max_running == 8


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    assert fault(app_args(engine={"kind": "sglang"})) == "models.0.engine: kind is one of native, vllm, auto"


def test_a_key_of_another_engine_is_refused() -> None:
    assert fault(app_args(engine={"tensor_parallel": 2})).startswith("models.0.engine.tensor_parallel: Extra inputs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": True}, "embeddings need engine.kind: native"),
        ({"quantization": "int8"}, "set engine.quantization"),
        ({"device_map": "auto"}, "device_map and device: cpu are for engine.kind: native"),
        ({"device": "cpu"}, "device_map and device: cpu are for engine.kind: native"),
        ({"source": "builtin:toy"}, "the toy model has no weights"),
    ],
)
def test_keys_that_vllm_does_not_have_are_refused(changes: dict[str, object], message: str) -> None:
    assert message in fault(app_args(**{"source": "a/b", "engine": {"kind": "vllm"}, **changes}))


@pytest.mark.parametrize(
    ("num_gpus", "tensor", "pipeline"), [(0, 1, 1), (0.5, 1, 1), (1, 1, 1), (4, 4, 1), (8, 8, 2), (1, 2, 1)]
)
def test_the_gpus_of_a_replica_are_all_or_those_of_one_node(num_gpus: float, tensor: int, pipeline: int) -> None:
    engine = {"kind": "vllm", "tensor_parallel": tensor, "pipeline_parallel": pipeline}
    AppConfig(**app_args(source="a/b", engine=engine, resources={"num_gpus": num_gpus}))


@pytest.mark.parametrize(("num_gpus", "tensor"), [(0, 2), (0.5, 2), (2, 1), (4, 2), (3, 4)])
def test_gpus_that_do_not_agree_are_refused(num_gpus: float, tensor: int) -> None:
    engine = {"kind": "vllm", "tensor_parallel": tensor}
    message = fault(app_args(source="a/b", engine=engine, resources={"num_gpus": num_gpus}))
    assert f"is {tensor}, but resources.num_gpus is {num_gpus}: set num_gpus to {tensor}" in message


def test_a_replica_on_several_nodes_has_no_limit_of_replicas_per_node() -> None:
    deployment = {**app_args()["models"][0]["deployment"], "max_replicas_per_node": 1}
    model: dict[str, Any] = {"source": "a/b", "resources": {"num_gpus": 1}, "deployment": deployment}
    AppConfig(**app_args(**model, engine={"kind": "vllm"}))
    message = fault(app_args(**model, engine={"kind": "vllm", "tensor_parallel": 2}))
    assert "deployment.max_replicas_per_node is not for replicas on several nodes; remove it" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_num_seqs", "max_num_seqs is set by the key engine.max_running of the model; remove it here"),
        ("scheduling_policy", "scheduling_policy has the value that this service needs; remove it"),
    ],
)
def test_arguments_of_vllm_that_other_keys_set_are_refused(name: str, message: str) -> None:
    engine = {"kind": "vllm", "options": {name: 1}}
    assert fault(app_args(source="a/b", engine=engine)) == f"models.0.engine.options: {message}"


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"method": "ngram", "model": "a/b"}, "method ngram takes no model"),
        ({"method": "eagle"}, "method eagle needs a model"),
    ],
)
def test_a_method_of_speculation_has_the_model_that_it_needs(speculative: dict[str, str], message: str) -> None:
    engine = {"kind": "vllm", "speculative": speculative}
    assert fault(app_args(source="a/b", engine=engine)) == f"models.0.engine.speculative: {message}"


def test_auto_gives_its_keys_to_the_chosen_engine() -> None:
    engine = {"kind": "auto", "max_running": 48}
    (model,) = AppConfig(**app_args(source="a/b", engine=engine, resources={"num_gpus": 2})).models
    assert (model.native_options.max_running, model.native_options.max_waiting) == (48, 256)
    assert (model.vllm_options.max_running, model.vllm_options.max_waiting) == (48, 1024)
    assert model.vllm_options.tensor_parallel == 2
    assert fault(app_args(quantization="int8", engine=engine)).endswith("quantization: int8 needs engine.kind: native")
