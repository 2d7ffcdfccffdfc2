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
    ConfigError,
    Model,
    Section,
    cache_dir,
    deployment_name,
    describe,
    load_serve_file,
    template_path,
)

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "serve_config.yaml"
DEPLOYMENT = {"num_replicas": 1, "max_ongoing_requests": 32, "max_queued_requests": 8}
SCALED = {**DEPLOYMENT, "num_replicas": None}
MODEL = {"name": "m", "source": "builtin:toy", "deployment": DEPLOYMENT}

# Every number of the tree, with the values nearest to what it takes that it must not take.
OF_A_DEPLOYMENT: dict[str, list[float]] = {
    "max_ongoing_requests": [0],
    "max_queued_requests": [0],
    "num_replicas": [0],
    "autoscaling.min_replicas": [-1],
    "autoscaling.max_replicas": [0],
    "autoscaling.target_ongoing_requests": [0],
    "autoscaling.upscale_delay_s": [-0.1],
    "autoscaling.downscale_delay_s": [-0.1],
    "autoscaling.downscale_to_zero_delay_s": [-0.1],
    "autoscaling.look_back_period_s": [10],  # callers report every 10 s
    "health_check_period_s": [0],
    "health_check_timeout_s": [0],
    "graceful_shutdown_wait_loop_s": [0],
    "graceful_shutdown_timeout_s": [-0.1],
    "max_surge_percent": [-1],
}
BOUNDS: dict[str, list[float]] = {
    **{f"ingress.deployment.{name}": values for name, values in OF_A_DEPLOYMENT.items()},
    **{f"models.0.deployment.{name}": values for name, values in OF_A_DEPLOYMENT.items()},
    "ingress.num_cpus": [-0.1],
    "limits.max_body_bytes": [1023],
    "limits.max_batch_items": [0],
    "limits.request_timeout_s": [0],
    "limits.warm_wait_s": [0],
    "limits.heartbeat_s": [0, 10.1],
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


def args(**model: Any) -> dict[str, Any]:
    document: dict[str, Any] = copied({"models": [{**MODEL, **model}], "ingress": {"deployment": DEPLOYMENT}})
    return document


def copied(document: Any) -> Any:
    """Unlike copy.deepcopy, two copies of what occurs twice."""
    if isinstance(document, dict):
        return {key: copied(value) for key, value in document.items()}
    return [copied(value) for value in document] if isinstance(document, list) else document


def with_value(path: str, value: object) -> dict[str, Any]:
    """Args that are right but for one place. A section that is not there begins empty."""
    document = args()
    *way, last = path.split(".")
    place: Any = document
    for part in way:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[last] = value
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


def fault(document: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        AppConfig.model_validate(document)
    (only,) = describe(error.value).splitlines()
    return only.removeprefix("  ")


def written(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def said(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_serve_file(path)
    return str(error.value)


def serve_file(**application: Any) -> dict[str, Any]:
    entry = {"name": "serve_app", "route_prefix": "/", "import_path": "serve_app.app:build", "args": args()}
    return {"applications": [{**entry, **application}]}


def test_the_shipped_file_is_the_laptops_default() -> None:
    file = load_serve_file(SHIPPED)
    assert (file.http_options.host, file.http_options.port) == ("127.0.0.1", 8000)
    assert (file.name, file.route_prefix) == ("serve_app", "/")
    (model,) = file.args.models
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


def test_every_deployment_of_the_shipped_file_states_its_limits() -> None:
    (application,) = yaml.safe_load(SHIPPED.read_text())["applications"]
    assert application["import_path"] == "serve_app.app:build"
    wanted = {"max_ongoing_requests", "max_queued_requests", "health_check_period_s", "health_check_timeout_s"}
    wanted |= {"graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s", "max_surge_percent"}
    for owner in application["args"]["models"]:
        assert wanted - set(owner["deployment"]) == set()
        assert ("num_replicas" in owner["deployment"]) != ("autoscaling" in owner["deployment"])


def test_every_number_of_a_deployment_in_the_shipped_file_has_its_reason_beside_it() -> None:
    text = SHIPPED.read_text()
    deployments = list(deployments_in(yaml.compose(text)))
    assert len(deployments) == len(load_serve_file(SHIPPED).args.models)
    lines = [text.splitlines()[number] for deployment in deployments for number in lines_of(deployment)]
    assert [line for line in lines if not re.search(r" # \w", line)] == []


def test_the_example_for_gpus_in_the_architecture_is_a_model() -> None:
    _, _, chapter = (ROOT / "docs/architecture.md").read_text().partition("\n## The same file on GPUs\n")
    (block,) = re.findall(r"```yaml\n(.*?)```", chapter.split("\n## ")[0], re.DOTALL)
    (model,) = [Model.model_validate(entry) for entry in yaml.safe_load(block)]
    assert model.resources.num_gpus == 1
    fused = {"ingress": {"fused": True}, "models": yaml.safe_load(block)}
    assert AppConfig.model_validate(fused).models == (model,), "the shipped file's shape takes it"


def test_the_ingress_for_several_models_in_the_architecture_is_one() -> None:
    _, _, chapter = (ROOT / "docs/architecture.md").read_text().partition("\n## Two shapes\n")
    (block,) = re.findall(r"```yaml\n(.*?)```", chapter.split("\n## ")[0], re.DOTALL)
    document = yaml.safe_load(block)
    assert list(document) == ["ingress"]
    assert not AppConfig.model_validate({**args(), **document}).ingress.fused


def test_every_fault_is_listed_with_its_path_one_a_line(tmp_path: Path) -> None:
    document = serve_file()
    faulty = document["applications"][0]["args"]
    faulty["models"][0]["engine"] = {"max_running": 0, "max_runing": 3}
    faulty["limits"] = {"request_timeout_s": -1}
    faulty["sauce"] = True
    text = said(written(tmp_path / "f.yaml", document))
    lines = text.splitlines()
    assert lines[0].endswith("f.yaml:")
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == [
        "args.limits.request_timeout_s",
        "args.models.0.engine.max_runing",
        "args.models.0.engine.max_running",
        "args.sauce",
    ]


def test_a_rule_between_fields_is_told_with_the_place_of_both(tmp_path: Path) -> None:
    document = serve_file(args=args(device="cuda"))
    assert said(written(tmp_path / "f.yaml", document)).endswith(
        "f.yaml:\n  args.models.0: Value error, device: cuda needs resources.num_gpus above 0"
    )
    assert said(written(tmp_path / "f.yaml", serve_file(args={}))).endswith(
        "f.yaml:\n  args.models: Field required\n  args.ingress: Field required"
    )


def test_a_faulty_model_is_not_also_a_missing_one() -> None:
    assert fault(with_value("models.0.source", "")).startswith("models.0.source: ")


@pytest.mark.parametrize("source", [None, "builtin:chatml_tools", "/some/where.jinja", "~/mine.jinja"])
def test_a_chat_template_is_a_path_or_one_of_ours(source: str | None) -> None:
    (model,) = AppConfig(**args(chat_template=source)).models
    assert model.chat_template == source


@pytest.mark.parametrize("source", ["builtin:", "builtin:other", "builtin:../templates/chatml_tools", "builtin:/etc/x"])
def test_a_chat_template_of_ours_that_is_not_there_names_those_that_are(source: str) -> None:
    told = fault(args(chat_template=source))
    assert told.startswith("models.0.chat_template: ")
    assert told.endswith("one of builtin:chatml_tools")


def test_a_template_of_ours_is_a_file_of_the_package() -> None:
    assert template_path("builtin:chatml_tools").read_text().startswith("{#")
    assert template_path("~/mine.jinja") == Path.home() / "mine.jinja"


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_that_is_unknown_is_refused_in_every_section(section: str) -> None:
    path = f"{section}.sauce".removeprefix(".")
    document = with_value(path, 1)
    if section.endswith("autoscaling"):
        deployment = document["ingress"] if section.startswith("ingress") else document["models"][0]
        deployment["deployment"]["num_replicas"] = None
    assert fault(document) == f"{path}: Extra inputs are not permitted"


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BOUNDS.items() for value in values])
def test_a_number_out_of_bounds_is_refused_with_its_path(path: str, value: float) -> None:
    assert re.match(rf"{re.escape(path)}: Input should be (greater|less) than ", fault(with_value(path, value)))


def test_every_number_is_bounded() -> None:
    assert sorted(numbers(AppConfig)) == sorted(BOUNDS)


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "http://", "grpc://localhost:4317", "http:///v1/traces"])
def test_a_collectors_address_is_one_of_http(endpoint: str) -> None:
    assert fault(with_value("telemetry.tracing.endpoint", endpoint)).startswith("telemetry.tracing.endpoint: ")


@pytest.mark.parametrize(
    ("telemetry", "told"),
    [
        ({"tracing": {"headers": {"api-key": "x"}}}, "telemetry.tracing.headers: Extra inputs are not permitted"),
        ({"log_format": "yaml"}, "telemetry.log_format: Input should be 'text' or 'json'"),
    ],
)
def test_what_telemetry_does_not_know_is_refused(telemetry: dict[str, object], told: str) -> None:
    assert fault({**args(), "telemetry": telemetry}) == told


def test_nothing_is_told_of_single_requests_unless_asked_for() -> None:
    telemetry = AppConfig(**args()).telemetry
    assert (telemetry.tracing, telemetry.log_format) == (None, "text")
    tracing = AppConfig(**args(), telemetry={"tracing": {}}).telemetry.tracing
    assert tracing is not None
    assert (tracing.sampling_ratio, tracing.capture_content) == (0.01, False)


def test_what_a_file_leaves_out_has_a_default(tmp_path: Path) -> None:
    document = {"applications": [{"import_path": "serve_app.app:build", "args": args()}]}
    file = load_serve_file(written(tmp_path / "f.yaml", document))
    assert (file.http_options.host, file.http_options.port) == ("127.0.0.1", 8000)
    assert (file.name, file.route_prefix) == ("default", "/"), "as Ray Serve has them"
    assert file.args.limits.request_timeout_s == 600


def test_the_address_is_as_the_file_says_and_other_options_are_rays(tmp_path: Path) -> None:
    options = {"host": "0.0.0.0", "port": 9000, "request_timeout_s": 5}
    file = load_serve_file(written(tmp_path / "f.yaml", {**serve_file(), "http_options": options}))
    assert (file.http_options.host, file.http_options.port) == ("0.0.0.0", 9000)


@pytest.mark.parametrize("port", [0, 65536, "http"])
def test_a_port_that_is_none_is_refused(tmp_path: Path, port: object) -> None:
    assert "http_options.port" in said(written(tmp_path / "f.yaml", {**serve_file(), "http_options": {"port": port}}))


def test_a_missing_file_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    assert said(path) == f"{path}: no such file; pass --config with the path of a serve_config.yaml"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [", "expected the node content"),
        (b"a: b: c", "mapping values are not allowed here"),
        (b"\0", "special characters are not allowed"),
        (b"\xff\xfe\xff", "can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_what_is_wrong(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    assert said(path).startswith(f"{path}: ")
    assert told in said(path)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "Is a directory" in said(tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "just words",
        "[]",
        {},
        {"applications": {}},
        {"applications": []},
        {"applications": [{}, {}]},
        {"applications": ["x"]},
    ],
    ids=repr,
)
def test_what_is_no_serve_file_of_one_application_is_refused(tmp_path: Path, document: object) -> None:
    path = written(tmp_path / "f.yaml", document)
    assert said(path) == f"{path}: expected a Ray Serve config with exactly one entry under `applications`"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"batching": {"max_batch_size": 33}}, "models.0: Value error, batching.max_batch_size 33 can never fill with"),
        (
            {"resources": {"num_gpus": 1.5}},
            "models.0.resources.num_gpus: Value error, 1.5 is neither a part of one GPU",
        ),
        ({"device": "cuda"}, "models.0: Value error, device: cuda needs resources.num_gpus above 0"),
        ({"name": "-x"}, "models.0.name: String should match pattern"),
        ({"name": "x\n"}, "models.0.name: String should match pattern"),
        ({"name": ""}, "models.0.name: String should have at least 1 character"),
        ({"source": ""}, "models.0.source: String should have at least 1 character"),
        ({"dtype": "int3"}, "models.0.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"quantization": "int3"}, "models.0.quantization: Input should be 'none', 'int8' or 'int4'"),
        ({"device": "tpu"}, "models.0.device: Input should be 'auto', 'cpu' or 'cuda'"),
        ({"deployment": None}, "models.0.deployment: Input should be a valid dictionary"),
    ],
    ids=str,
)
def test_a_model_that_cannot_work_is_refused(model: dict[str, Any], told: str) -> None:
    assert fault(args(**model)).startswith(told)


def test_what_the_rules_between_fields_allow_is_allowed() -> None:
    document = args(batching={"max_batch_size": 32}, device="cuda", resources={"num_gpus": 0.5})
    assert AppConfig.model_validate(document).models[0].resources.num_gpus == 0.5


@pytest.mark.parametrize("owner", ["ingress", "models.0"])
@pytest.mark.parametrize("deployment", [SCALED, {**DEPLOYMENT, "autoscaling": {}}], ids=["neither", "both"])
def test_a_deployment_scales_in_exactly_one_way(owner: str, deployment: dict[str, Any]) -> None:
    told = f"{owner}.deployment: Value error, state exactly one of num_replicas and autoscaling"
    assert fault(with_value(f"{owner}.deployment", deployment)) == told


@pytest.mark.parametrize(("scaling", "to_zero"), [({"min_replicas": 0}, True), ({"min_replicas": 1}, False)])
def test_a_deployment_knows_whether_it_scales_to_zero(scaling: dict[str, int], to_zero: bool) -> None:
    config = AppConfig.model_validate(args(deployment={**SCALED, "autoscaling": scaling}))
    assert config.models[0].deployment.scales_to_zero is to_zero
    assert config.ingress.deployment is not None
    assert not config.ingress.deployment.scales_to_zero


@pytest.mark.parametrize(
    ("ingress", "models", "told"),
    [
        ({"fused": True, "deployment": DEPLOYMENT}, [MODEL], "ingress: Value error, fused: true makes the model's own"),
        ({"fused": True, "num_cpus": 1}, [MODEL], "ingress: Value error, fused: true makes the model's own deployment"),
        ({}, [MODEL], "ingress: Value error, state ingress.deployment, or fused: true where there is exactly one"),
        ({"fused": False}, [MODEL], "ingress: Value error, state ingress.deployment, or fused: true"),
        (
            {"fused": True},
            [MODEL, {**MODEL, "name": "n"}],
            "(top): Value error, ingress.fused takes exactly one model, not 2; set it to false and state",
        ),
        (
            {"fused": True},
            [{**MODEL, "deployment": {**SCALED, "autoscaling": {"min_replicas": 0}}}],
            "(top): Value error, with ingress.fused nobody could answer while the model is scaled to zero",
        ),
    ],
)
def test_an_ingress_that_cannot_work_is_refused(ingress: Any, models: list[Any], told: str) -> None:
    assert fault({"models": copied(models), "ingress": copied(ingress)}).startswith(told)


def test_one_model_may_be_its_own_ingress() -> None:
    config = AppConfig.model_validate({"models": [MODEL], "ingress": {"fused": True}})
    assert config.ingress.deployment is None


def test_replicas_that_would_never_be_added_are_refused() -> None:
    narrow: dict[str, Any] = {**SCALED, "max_ongoing_requests": 8, "max_queued_requests": 16}
    narrow["autoscaling"] = {"max_replicas": 4}
    told = fault(args(deployment=narrow, batching={"max_batch_size": 8}))
    assert "autoscaling.target_ongoing_requests 32 is never passed with 24 requests at most" in told


def test_bounds_of_autoscaling_are_in_order() -> None:
    told = fault(args(deployment={**SCALED, "autoscaling": {"min_replicas": 3, "max_replicas": 2}}))
    assert told.startswith("models.0.deployment.autoscaling: ")
    assert told.endswith("min_replicas 3 is above max_replicas 2")


@pytest.mark.parametrize(("one", "other"), [("a/b", "a:b"), ("a/b", "a-b"), ("same", "same")])
def test_two_models_that_would_share_a_deployment_are_refused(one: str, other: str) -> None:
    document = {**args(), "models": [{**MODEL, "name": name} for name in (one, "m", other)]}
    told = f"two models would share the deployment {deployment_name(one)}; give them distinct names"
    assert fault(document) == f"(top): Value error, {told}"


def test_models_that_differ_in_their_deployments_name_live_side_by_side() -> None:
    names = ["a/b", "a.b", "a_b", "A/B"]
    config = AppConfig.model_validate({**args(), "models": [{**MODEL, "name": name} for name in names]})
    assert [model.name for model in config.models] == names


@pytest.mark.parametrize(
    ("name", "deployment"),
    [("org/Model-1.5_x:q4", "model-org-Model-1.5_x-q4"), ("m", "model-m"), ("a//b", "model-a--b")],
)
def test_a_deployments_name_is_its_models_with_what_it_cannot_hold_replaced(name: str, deployment: str) -> None:
    assert deployment_name(name) == deployment


def test_no_model_is_no_service() -> None:
    assert fault({**args(), "models": []}).startswith("models: Tuple should have at least 1 item")


def test_nothing_is_changed_after_it_was_read() -> None:
    config = AppConfig.model_validate(args())
    with pytest.raises(ValidationError):
        config.limits.request_timeout_s = 1  # type: ignore[misc]


def test_conversions_are_kept_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "serve_app"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache/serve_app"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/serve_app"
