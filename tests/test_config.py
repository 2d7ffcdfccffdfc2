from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import (
    AppConfig,
    ConfigError,
    Model,
    cache_dir,
    deployment_name,
    describe,
    load_serve_file,
)

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "serve_config.yaml"
DEPLOYMENT = {"num_replicas": 1, "max_ongoing_requests": 32, "max_queued_requests": 8}
MODEL = {"name": "m", "source": "builtin:toy", "deployment": DEPLOYMENT}


def args(**model: Any) -> dict[str, Any]:
    return {"models": [{**MODEL, **model}], "ingress": {"deployment": DEPLOYMENT}}


def fault(document: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        AppConfig.model_validate(document)
    (only,) = describe(error.value).splitlines()
    return only


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


def test_every_deployment_of_the_shipped_file_states_its_limits_each_with_a_reason() -> None:
    (application,) = yaml.safe_load(SHIPPED.read_text())["applications"]
    assert application["import_path"] == "serve_app.app:build"
    deployments = [owner["deployment"] for owner in (application["args"]["ingress"], *application["args"]["models"])]
    wanted = ["max_ongoing_requests", "max_queued_requests", "health_check_period_s", "health_check_timeout_s"]
    wanted += ["graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s", "max_surge_percent"]
    for deployment in deployments:
        assert [name for name in wanted if name not in deployment] == []
        assert ("num_replicas" in deployment) != ("autoscaling" in deployment)
    lines = SHIPPED.read_text().splitlines()
    numbers = [line for line in lines if re.search(r"_(s|requests|replicas|percent): ", line)]
    assert len(numbers) >= 2 * len(wanted)
    assert [line for line in numbers if "# " not in line] == []


def test_the_example_for_gpus_in_the_architecture_is_a_model() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    (model,) = [Model.model_validate(entry) for entry in yaml.safe_load(block)]
    assert model.resources.num_gpus == 1
    assert model.deployment.scales_to_zero


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


def test_what_a_file_leaves_out_has_a_default(tmp_path: Path) -> None:
    file = load_serve_file(written(tmp_path / "f.yaml", serve_file()))
    assert (file.http_options.host, file.http_options.port) == ("127.0.0.1", 8000)
    assert file.args.limits.request_timeout_s == 600


@pytest.mark.parametrize("port", [0, 65536, "http"])
def test_a_port_that_is_none_is_refused(tmp_path: Path, port: object) -> None:
    assert "http_options.port" in said(written(tmp_path / "f.yaml", {**serve_file(), "http_options": {"port": port}}))


def test_a_missing_file_is_told_apart(tmp_path: Path) -> None:
    assert said(tmp_path / "nowhere.yaml").endswith("no such file; pass --config with the path of a serve_config.yaml")


@pytest.mark.parametrize(
    "document",
    ["a: [", "\0", "just words", "[]", {}, {"applications": []}, {"applications": [{}, {}]}, {"applications": ["x"]}],
    ids=repr,
)
def test_what_is_no_serve_file_is_refused(tmp_path: Path, document: object) -> None:
    assert "f.yaml:" in said(written(tmp_path / "f.yaml", document))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"batching": {"max_batch_size": 33}}, "max_batch_size 33 can never fill with"),
        ({"device": "cuda"}, "device: cuda needs resources.num_gpus above 0"),
        ({"deployment": {**DEPLOYMENT, "autoscaling": {}}}, "exactly one of num_replicas and autoscaling"),
        ({"deployment": {**DEPLOYMENT, "num_replicas": None}}, "exactly one of num_replicas and autoscaling"),
        ({"name": "-x"}, "should match pattern"),
        ({"source": ""}, "at least 1 character"),
        ({"dtype": "int3"}, "'float32', 'bfloat16' or 'float16'"),
        ({"resources": {"num_gpus": -1}}, "greater than or equal to 0"),
        ({"sampling_defaults": {"temperature": 3}}, "less than or equal to 2"),
    ],
    ids=str,
)
def test_a_model_that_cannot_work_is_refused(model: dict[str, Any], told: str) -> None:
    assert told in fault(args(**model))


def test_bounds_of_autoscaling_are_in_order() -> None:
    scaling = {"min_replicas": 3, "max_replicas": 2}
    deployment = {**DEPLOYMENT, "num_replicas": None, "autoscaling": scaling}
    assert "min_replicas 3 is above max_replicas 2" in fault(args(deployment=deployment))
    deployment["autoscaling"] = {"look_back_period_s": 10}
    assert "look_back_period_s" in fault(args(deployment=deployment)), "callers report every 10 s"


def test_two_models_need_two_deployments() -> None:
    document = args()
    document["models"] += [{**copy.deepcopy(MODEL), "name": "a/b"}, {**copy.deepcopy(MODEL), "name": "a:b"}]
    assert "two models would share the deployment model-a-b" in fault(document)
    assert deployment_name("org/Model-1.5_x:q4") == "model-org-Model-1.5_x-q4"


def test_no_model_is_no_service() -> None:
    assert "models" in fault({**args(), "models": []})


def test_nothing_is_changed_after_it_was_read() -> None:
    config = AppConfig.model_validate(args())
    with pytest.raises(ValidationError):
        config.limits.request_timeout_s = 1  # type: ignore[misc]


def test_conversions_are_kept_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "serve_app"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/serve_app"
