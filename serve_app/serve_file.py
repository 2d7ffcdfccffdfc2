"""Reads the Ray Serve config file that `python -m serve_app` runs or deploys.

Ray's `serve deploy` takes the same file. A key that neither program honours is refused with its path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from serve_app.config import AppConfig, ConfigError, Section, describe
from serve_app.experiment_config import Experiments, check_models

IMPORT_PATH = "serve_app.app:build"


class HttpOptions(Section):
    """Ray Serve's options for its HTTP proxy, with times in seconds. None leaves Ray's own default."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = Field(None, gt=0)
    keep_alive_timeout_s: int = Field(620, ge=0)


class IngressOptions(Section):
    """The entry of `deployments`: what can change while the service runs."""

    name: Literal["Ingress"]
    user_config: Experiments = Experiments()


class Application(Section):
    """One entry of `applications`."""

    name: str = "default"
    route_prefix: str = "/"
    import_path: Literal["serve_app.app:build"]
    args: AppConfig
    deployments: Annotated[tuple[IngressOptions, ...], Field(max_length=1)] = ()

    @property
    def user_config(self) -> dict[str, Any] | None:
        """The `user_config` of the ingress as Ray Serve takes it; None without one."""
        if not self.deployments:
            return None
        return self.deployments[0].user_config.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="after")
    def _check_experiments(self) -> Application:
        for deployment in self.deployments:
            models = [model for model in self.args.models if model.lora is not None]
            adapters = {one.name: model.name for model in models if model.lora for one in model.lora.adapters}
            try:
                check_models(deployment.user_config, self.args, adapters)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self


class ServeFile(Section):
    """The keys of a Ray Serve config file that this program honours."""

    http_options: HttpOptions = HttpOptions()
    applications: tuple[Application] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> Application:
        return self.applications[0]


# Keys of Ray's schema that `serve deploy` honours and this program does not, by the path of their mapping.
_ONLY_DEPLOY = {
    "": {
        *("proxy_location", "grpc_options", "logging_config", "tracing_config", "target_capacity"),
        "controller_options",
    },
    # HAProxy, which this program puts in front of the service, speaks no TLS as Ray configures it.
    "http_options": {"ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs"},
    "applications.0": {
        *("runtime_env", "host", "port", "autoscaling_policy", "external_scaler_enabled"),
        "logging_config",
    },
    "applications.0.deployments.0": {
        *("num_replicas", "autoscaling_config", "max_ongoing_requests", "max_queued_requests", "ray_actor_options"),
        *("health_check_period_s", "health_check_timeout_s", "graceful_shutdown_timeout_s", "logging_config"),
        *("graceful_shutdown_wait_loop_s", "backpressure_config", "deployment_actors", "gang_scheduling_config"),
        *("max_replicas_per_node", "max_surge_percent", "rolling_update_percentage", "request_router_config"),
        *("placement_group_bundle_label_selector", "placement_group_bundles", "placement_group_strategy"),
    },
}


def load_serve_file(path: str | Path) -> ServeFile:
    """Read a Ray Serve config file with one application of this project.

    Raises ConfigError, with every fault and its place, if the file cannot be used.
    """
    return _validated(path, _read_application(path))


def load_deploy_file(path: str | Path) -> dict[str, Any]:
    """Read a Ray Serve config file for a cluster, with the keys that only `serve deploy` honours.

    Raises ConfigError, with every fault and its place. Ray checks the keys that are its own.
    """
    document = _read_application(path)
    file = _validated(path, _without_ray_keys(document, ""))
    try:
        # Without the key, Ray listens on all addresses.
        host = (document.get("http_options") or {}).get("host", "0.0.0.0")
        file.application.args.check_address(host)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return document


def _read_application(path: str | Path) -> dict[str, Any]:
    """A file with exactly one application. Raises ConfigError."""
    document = _read(path)
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: expected a Ray Serve config with exactly one entry under `applications`")
    return cast("dict[str, Any]", document)


def _without_ray_keys(value: Any, path: str) -> Any:
    """A copy of the document without the keys of `_ONLY_DEPLOY`."""
    if isinstance(value, list):
        if path == "applications.0.deployments":  # entries of models have keys of Ray only
            value = [one for one in value if not isinstance(one, dict) or one.get("name") == "Ingress"]
        return [_without_ray_keys(one, f"{path}.{n}") for n, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    dropped = _ONLY_DEPLOY.get(path, set())
    return {
        key: _without_ray_keys(one, f"{path}.{key}".lstrip(".")) for key, one in value.items() if key not in dropped
    }


def _validated(path: str | Path, document: dict[str, Any]) -> ServeFile:
    try:
        return ServeFile.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{describe(error, _sentence)}") from None


def _read(path: str | Path) -> object:
    """Raises ConfigError."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass --config with the path of a serve_config.yaml") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _sentence(path: str, message: str, kind: str) -> str:
    owner, _, key = path.rpartition(".")
    if kind == "extra_forbidden" and key in _ONLY_DEPLOY.get(owner, ()):
        return "only `serve deploy` honours this key; remove it, or deploy the file with `serve deploy`"
    if kind == "extra_forbidden":
        return "unknown key"
    if path == "applications.0.import_path":
        return f"this program runs {IMPORT_PATH} only; deploy other applications with `serve deploy`"
    return message


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with a duplicate key. PyYAML itself takes the last of the values."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set[tuple[str, str]]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when the mapping is constructed
            if (key.tag, key.value) in keys:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} occurs twice", key.start_mark)
            keys.add((key.tag, key.value))
        return node
