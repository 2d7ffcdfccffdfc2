"""The Ray Serve config file: what this program honours of it, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import serve_file
from serve_app.config import ConfigError
from serve_app.serve_file import ServeFile, load_deploy_file, load_serve_file
from tests.configs import MODEL, SHIPPED, app_args, serve_document

ONLY_DEPLOY = "only `serve deploy` honours this key; remove it, or deploy the file with `serve deploy`"
ONLY_DEPLOY_KEYS = [(path, key) for path, keys in serve_file._ONLY_DEPLOY.items() for key in sorted(keys)]


def written(folder: Path, document: object) -> Path:
    path = folder / "f.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def loaded(folder: Path, document: object) -> ServeFile:
    return load_serve_file(written(folder, document))


def refusal(path: Path) -> str:
    """The message without the path of the file at its beginning."""
    with pytest.raises(ConfigError) as error:
        load_serve_file(path)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


def faults(folder: Path, document: object) -> dict[str, str]:
    """The sentence about each faulty key, by its path."""
    first, *lines = refusal(written(folder, document)).splitlines()
    assert first == ":"
    sentences = dict[str, str]()
    for line in lines:
        path, _, sentence = line.strip().partition(": ")
        assert path not in sentences
        sentences[path] = sentence
    return sentences


def with_key(path: str, key: str, value: object) -> dict[str, Any]:
    """A valid document but for one key of the mapping at `path`."""
    document = serve_document()
    application = document["applications"][0]
    mapping = {"": document, "applications.0": application}
    if path.startswith("applications.0.deployments"):
        application["deployments"] = [{"name": "Ingress"}]
        mapping[path] = application["deployments"][0]
    mapping.get(path, document.setdefault("http_options", {}))[key] = value
    return document


def test_the_shipped_file_listens_on_loopback() -> None:
    file = load_serve_file(SHIPPED)
    assert (file.http_options.host, file.http_options.port) == ("127.0.0.1", 8000)
    assert (file.application.name, file.application.route_prefix) == ("serve_app", "/")
    assert file.application.import_path == serve_file.IMPORT_PATH


def test_defaults(tmp_path: Path) -> None:
    document = {"applications": [{"import_path": "serve_app.app:build", "args": {"models": [MODEL]}}]}
    file = loaded(tmp_path, document)
    assert (file.application.name, file.application.route_prefix) == ("default", "/"), "Ray Serve's defaults"
    options = {"host": "127.0.0.1", "port": 8000, "root_path": "", "keep_alive_timeout_s": 620}
    assert file.http_options.model_dump(exclude_none=True) == options


def test_all_http_options_are_kept(tmp_path: Path) -> None:
    options = {"host": "0.0.0.0", "port": 9000, "root_path": "/llm", "request_timeout_s": 5, "keep_alive_timeout_s": 0}
    assert loaded(tmp_path, {**serve_document(), "http_options": options}).http_options.model_dump() == options


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", 0),
        ("port", 65536),
        ("port", "http"),
        ("request_timeout_s", 0),
        ("keep_alive_timeout_s", -1),
        ("host", None),
    ],
)
def test_an_invalid_http_option_is_refused(tmp_path: Path, key: str, value: object) -> None:
    assert list(faults(tmp_path, with_key("http_options", key, value))) == [f"http_options.{key}"]


@pytest.mark.parametrize("path", ["", "http_options", "applications.0"])
def test_an_unknown_key_is_refused(tmp_path: Path, path: str) -> None:
    document = with_key(path, "sauce", 1)
    assert faults(tmp_path, document) == {f"{path}.sauce".removeprefix("."): "unknown key"}


@pytest.mark.parametrize(("path", "key"), ONLY_DEPLOY_KEYS)
def test_a_key_that_only_serve_deploy_honours_is_refused(tmp_path: Path, path: str, key: str) -> None:
    assert faults(tmp_path, with_key(path, key, {})) == {f"{path}.{key}".removeprefix("."): ONLY_DEPLOY}


def with_experiment(**variant: Any) -> dict[str, Any]:
    """A valid document with an experiment, but for the keys of its second variant."""
    variants = [{"name": "control", "model": "m"}, {"name": "b", "model": "m", "percent": 10, **variant}]
    document = serve_document()
    user_config = {"experiments": [{"name": "chat", "variants": variants}]}
    document["applications"][0]["deployments"] = [{"name": "Ingress", "user_config": user_config}]
    return document


def test_experiments_are_passed_on_as_json(tmp_path: Path) -> None:
    document = with_experiment()
    experiment = document["applications"][0]["deployments"][0]["user_config"]["experiments"][0]
    experiment["ramp"] = [{"at": "2026-10-01T08:00:00Z", "percent": 5.0}]
    application = loaded(tmp_path, document).application
    assert application.user_config == document["applications"][0]["deployments"][0]["user_config"]
    assert loaded(tmp_path, serve_document()).application.user_config is None


def test_an_experiment_with_an_unknown_model_or_key_is_refused(tmp_path: Path) -> None:
    place = "applications.0.deployments.0.user_config.experiments.0.variants.1"
    assert faults(tmp_path, with_experiment(sauce=1)) == {f"{place}.sauce": "unknown key"}
    message = refusal(written(tmp_path, with_experiment(model="none")))
    assert "chat, variant b: there is no model none; the models are m" in message


def test_only_the_ingress_has_options_in_deployments(tmp_path: Path) -> None:
    document = serve_document(deployments=[{"name": "model-m"}])
    assert faults(tmp_path, document) == {"applications.0.deployments.0.name": "Input should be 'Ingress'"}


def test_a_key_of_another_mapping_is_unknown(tmp_path: Path) -> None:
    assert faults(tmp_path, with_key("", "runtime_env", {})) == {"runtime_env": "unknown key"}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # by Ray
def test_every_key_of_rays_schema_is_honoured_or_refused_by_name() -> None:
    from ray.serve import schema

    for ray, ours, path in (
        (schema.ServeDeploySchema, serve_file.ServeFile, ""),
        (schema.HTTPOptionsSchema, serve_file.HttpOptions, "http_options"),
        (schema.ServeApplicationSchema, serve_file.Application, "applications.0"),
        (schema.DeploymentSchema, serve_file.IngressOptions, "applications.0.deployments.0"),
    ):
        refused = serve_file._ONLY_DEPLOY[path]
        assert set(ray.model_fields) == set(ours.model_fields) | refused
        assert set(ours.model_fields) & refused == set()
    schema.ServeDeploySchema.model_validate(yaml.safe_load(SHIPPED.read_text()))


@pytest.mark.parametrize("import_path", ["other.module:app", "serve_app.app", "serve_app.app:build2", "", None])
def test_another_import_path_is_refused(tmp_path: Path, import_path: str | None) -> None:
    sentence = "this program runs serve_app.app:build only; deploy other applications with `serve deploy`"
    assert faults(tmp_path, serve_document(import_path=import_path)) == {"applications.0.import_path": sentence}


def test_every_fault_has_a_line_with_its_path(tmp_path: Path) -> None:
    document = serve_document(sauce=1)
    args = document["applications"][0]["args"]
    args["models"][0]["engine"] = {"max_running": 0, "max_runing": 3}
    args["limits"] = {"request_timeout_s": -1}
    args["sauce"] = True
    document["proxy_location"] = "Disabled"
    assert faults(tmp_path, document) == {
        "applications.0.args.limits.request_timeout_s": "Input should be greater than 0",
        "applications.0.args.models.0.engine.max_runing": "unknown key",
        "applications.0.args.models.0.engine.max_running": "Input should be greater than or equal to 1",
        "applications.0.args.sauce": "unknown key",
        "applications.0.sauce": "unknown key",
        "proxy_location": ONLY_DEPLOY,
    }


def test_a_rule_between_keys_is_reported_at_their_section(tmp_path: Path) -> None:
    document = serve_document(args=app_args(device="cuda"))
    sentence = "device: cuda needs resources.num_gpus above 0"
    assert faults(tmp_path, document) == {"applications.0.args.models.0": sentence}


def test_fused_is_refused(tmp_path: Path) -> None:
    document = serve_document(args={"models": [MODEL], "ingress": {"fused": True}})
    ((path, sentence),) = faults(tmp_path, document).items()
    assert path == "applications.0.args.ingress"
    assert sentence.startswith("fused was removed")


def test_missing_args_are_reported(tmp_path: Path) -> None:
    document = {"applications": [{"import_path": "serve_app.app:build"}]}
    assert faults(tmp_path, document) == {"applications.0.args": "Field required"}


@pytest.mark.parametrize(
    "original",
    [
        "applications:",
        "  port: 8000",
        "    import_path: serve_app.app:build",
        "      telemetry:",
        "        max_batch_items: 256",
        "          device: auto",
        "            max_running: 32",
        "              min_replicas: 1",
    ],
)
def test_a_duplicate_key_is_refused_with_its_line_at_every_level(tmp_path: Path, original: str) -> None:
    """The shipped file with a second, quoted, occurrence of a key before the original one."""
    lines = SHIPPED.read_text().splitlines()
    (at,) = [number for number, text in enumerate(lines) if text.startswith(original)]
    key = original.strip().split(":")[0]
    lines.insert(at, original.replace(original.strip(), f"'{key}': 1"))
    # The inserted line is number `at + 1`, the original one follows.
    assert refusal(written(tmp_path, "\n".join(lines))) == f", line {at + 2}: the key {key} occurs twice"


def test_a_duplicate_key_in_braces_is_refused(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, "a:\n- {b: 1, b: 1}\n")) == ", line 2: the key b occurs twice"


def test_the_same_key_in_two_mappings_is_valid(tmp_path: Path) -> None:
    models = [MODEL, {**MODEL, "name": "n"}]
    assert len(loaded(tmp_path, serve_document(args={"models": models})).application.args.models) == 2


def test_merge_keys_are_honoured(tmp_path: Path) -> None:
    """As by `serve deploy`. A key beside `<<` overrides the merged one, and is no duplicate."""
    text = """
applications:
  - import_path: serve_app.app:build
    args:
      models:
        - &first
          name: m
          source: builtin:toy
          deployment: {num_replicas: 1, max_ongoing_requests: 32, max_queued_requests: 8}
        - {<<: *first, name: n}
"""
    one, other = loaded(tmp_path, text).application.args.models
    assert (one.name, other.name) == ("m", "n")
    assert one.deployment == other.deployment


def test_a_missing_file_is_refused_with_the_option(tmp_path: Path) -> None:
    assert refusal(tmp_path / "f.yaml") == ": no such file; pass --config with the path of a serve_config.yaml"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\na: [", ", line 2: expected the node content"),
        (b"a: b: c", ", line 1: mapping values are not allowed here"),
        (b"? [a]\n: 1", ", line 1: found unhashable key"),
        (b"a: !!python/name:os.system", ", line 1: could not determine a constructor"),
        (b"\0", ": unacceptable character #x0000: special characters are not allowed"),
        (b"\xff\xfe\xff", ": 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_invalid_yaml_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(message)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)


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
        {"applications": serve_document()["applications"] * 2},
    ],
    ids=repr,
)
def test_other_than_one_application_is_refused(tmp_path: Path, document: object) -> None:
    message = ": expected a Ray Serve config with exactly one entry under `applications`"
    assert refusal(written(tmp_path, document)) == message


@pytest.mark.parametrize(("path", "key"), ONLY_DEPLOY_KEYS)
def test_a_file_to_deploy_may_have_the_keys_of_ray(tmp_path: Path, path: str, key: str) -> None:
    document = with_key(path, key, {"of": "Ray"})
    assert load_deploy_file(written(tmp_path, document)) == document


def test_a_file_to_deploy_is_validated_otherwise(tmp_path: Path) -> None:
    document = with_key("applications.0", "runtime_env", {})
    document["applications"][0]["args"]["sauce"] = 1
    with pytest.raises(ConfigError, match=r"applications\.0\.args\.sauce: unknown key"):
        load_deploy_file(written(tmp_path, document))


def test_a_file_to_deploy_may_set_options_of_the_deployment_of_a_model(tmp_path: Path) -> None:
    document = with_key(
        "applications.0", "deployments", [{"name": "model-toy", "num_replicas": 3}, {"name": "Ingress"}]
    )
    assert load_deploy_file(written(tmp_path, document)) == document


@pytest.mark.parametrize(
    ("options", "auth", "accepted"),
    [
        ({}, None, False),  # Ray listens on all addresses
        ({"host": "0.0.0.0"}, None, False),
        ({"host": "127.0.0.1"}, None, True),
        ({"host": "0.0.0.0"}, {}, True),
        ({}, {"allow_anonymous": True}, True),
    ],
)
def test_a_file_to_deploy_says_who_may_use_the_service(
    tmp_path: Path, options: dict[str, Any], auth: Any, accepted: bool
) -> None:
    document = serve_document()
    document["http_options"] = options
    document["applications"][0]["args"]["auth"] = auth
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    if accepted:
        assert load_deploy_file(path) == document
    else:
        with pytest.raises(ConfigError, match=r"serve\.yaml: the service would listen on 0\.0\.0\.0 without"):
            load_deploy_file(path)
