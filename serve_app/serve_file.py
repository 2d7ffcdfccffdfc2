"""Reads the Ray Serve config file that `python -m serve_app` runs.

`serve deploy` takes the same file. What this program does not do with it, it refuses by the path of the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from serve_app.config import AppConfig, ConfigError, Section, describe

IMPORT_PATH = "serve_app.app:build"


class HttpOptions(Section):
    """Where and how Ray Serve's proxy listens: the keys of Ray's own schema, passed on as they are."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = None
    keep_alive_timeout_s: int | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class Application(Section):
    """One entry of `applications`."""

    name: str = "default"
    route_prefix: str = "/"
    import_path: Literal["serve_app.app:build"]
    args: AppConfig


class ServeFile(Section):
    """The parts of a Ray Serve config file that this program honours."""

    http_options: HttpOptions = HttpOptions()
    applications: tuple[Application] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> Application:
        return self.applications[0]


# Keys of Ray's schema that `serve deploy` honours and this program does not.
_ONLY_DEPLOY = {
    "": {"proxy_location", "grpc_options", "logging_config", "target_capacity", "controller_options"},
    "applications.0": {
        *("runtime_env", "host", "port", "deployments", "autoscaling_policy", "external_scaler_enabled"),
        *("logging_config", "tracing_config"),
    },
}


def load_serve_file(path: str | Path) -> ServeFile:
    """Read a Ray Serve config file with one application of this project.

    Raises ConfigError with every fault and its place when the file cannot be used.
    """
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass --config with the path of a serve_config.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: expected a Ray Serve config with exactly one entry under `applications`")
    try:
        return ServeFile.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{describe(error, _sentence)}") from None


def _sentence(place: str, message: str, kind: str) -> str:
    owner, _, key = place.rpartition(".")
    if kind == "extra_forbidden" and key in _ONLY_DEPLOY.get(owner, ()):
        return "only `serve deploy` honours this key; remove it, or deploy the file with `serve deploy`"
    if kind == "extra_forbidden":
        return "unknown key"
    if place == "applications.0.import_path":
        return f"this program runs {IMPORT_PATH} only; deploy other applications with `serve deploy`"
    return message


class _Loader(yaml.SafeLoader):
    """YAML in which a key occurs once in a mapping; PyYAML itself takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[object]()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
