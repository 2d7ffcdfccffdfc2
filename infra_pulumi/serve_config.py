"""Reads a Ray Serve config of this service, and adapts it to a cluster. Pure functions over data."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra_pulumi import pod_resources
from infra_pulumi.catalogue import Catalogue
from infra_pulumi.spec import ClusterSpec, Fault, SpecError

Object = dict[str, Any]
# Sections with the URL of a server, and the ports of URLs without one.
_SERVERS = ("database", "quotas", "response_cache")
_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "redis": 6379, "rediss": 6379}


class _Section(BaseModel):
    """The part of the service's configuration that this module reads; the service validates the rest.

    Numbers are strict, because the cluster gets the file's values unchanged.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Resources(_Section):
    num_gpus: float = Field(0, ge=0, strict=True)


class _Engine(_Section):
    kind: Literal["native", "vllm", "auto"] = "native"
    tensor_parallel: int = Field(1, ge=1, strict=True)
    pipeline_parallel: int = Field(1, ge=1, strict=True)
    enforce_eager: bool = Field(False, strict=True)


class _Autoscaling(_Section):
    max_replicas: int = Field(1, ge=1, strict=True)


class _Deployment(_Section):
    autoscaling: _Autoscaling | None = None


class _Model(_Section):
    name: str = ""
    source: str = ""
    device: str = "auto"
    embeddings: bool = False
    resources: _Resources | None = None
    engine: _Engine | None = None
    deployment: _Deployment | None = None


class _Limits(_Section):
    request_timeout_s: float = Field(600, gt=0, strict=True)


class _Ingress(_Section):
    deployment: dict[str, Any] | None = None
    num_cpus: float = Field(0, ge=0, strict=True)


class _Service(_Section):
    ingress: _Ingress | None = None
    models: tuple[_Model, ...] = Field(min_length=1)
    limits: _Limits | None = None


class _Application(_Section):
    args: _Service


class _HttpOptions(_Section):
    port: int = Field(8000, ge=1, le=65535, strict=True)


class _File(_Section):
    applications: tuple[_Application, ...] = Field(min_length=1)
    http_options: _HttpOptions | None = None


def read_config(path: Path) -> Object:
    """Read a Ray Serve config file of this service. Raises SpecError with all faults of the validated part."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        _File.model_validate(document)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError([Fault("serve.config", " ".join(str(error).split()))]) from None
    except ValidationError as error:
        message = f"{path} is not a Ray Serve config of this service; start from the repository's serve_config.yaml"
        faults = [Fault(f"serve.config: {'.'.join(map(str, each['loc']))}", each["msg"]) for each in error.errors()]
        raise SpecError([Fault("serve.config", message), *faults]) from None
    assert isinstance(document, dict)
    return document


def longest_request_s(config: Object) -> int:
    """The longest allowed duration of a request, in whole seconds."""
    services = [application.args for application in _File.model_validate(config).applications]
    return math.ceil(max((service.limits or _Limits()).request_timeout_s for service in services))


@dataclass(frozen=True, slots=True)
class VllmModel:
    """A model whose engine is vLLM. One replica has `gpus` GPUs, of which `gpus_per_node` are on one node."""

    name: str
    gpus: int
    gpus_per_node: float
    enforce_eager: bool


def vllm_models(config: Object) -> tuple[VllmModel, ...]:
    """The models whose engine is vLLM on a GPU node that has vLLM, in order. `auto` takes vLLM there."""
    models = [each for application in _File.model_validate(config).applications for each in application.args.models]
    return tuple(_vllm_model(model) for model in models if _uses_vllm(model))


def _uses_vllm(model: _Model) -> bool:
    kind = (model.engine or _Engine()).kind
    native_only = model.device == "cpu" or model.embeddings or model.source.startswith("builtin:toy")
    return kind == "vllm" or (kind == "auto" and not native_only)


def _vllm_model(model: _Model) -> VllmModel:
    engine = model.engine or _Engine()
    reserved = (model.resources or _Resources()).num_gpus
    gpus = engine.tensor_parallel * engine.pipeline_parallel if engine.kind == "vllm" else max(1, int(reserved))
    return VllmModel(model.name, gpus, reserved or gpus, engine.enforce_eager)


def cluster_config(spec: ClusterSpec, catalogue: Catalogue, config: Object) -> Object:
    """The config for the cluster. It differs from the file in these values:

    - HTTP listens on all addresses of a pod, because other pods connect to the pod's address.
    - Without `auth` everyone who reaches the port may use the service, and the network policy decides who does.
    - An ingress that reserves no CPU reserves one. It then runs on a worker, because Ray's head has no CPU to give; an
      ingress on the head would end with the head.
    - A model that reserves no GPU reserves one, or with vLLM all GPUs of a replica, unless it has `device: cpu`.
    - `device: auto` becomes `cuda`, so that a missing or old driver is an error instead of a slow replica on the CPU.
    - A model with at most one replica may have as many replicas as the pools have GPUs for.

    Raises SpecError if a model reserves more GPUs than a node has, if nothing decides who may use the service, and if
    API keys would be in a file of one pod.
    """
    config = deepcopy(config)
    config["http_options"] = {**(config.get("http_options") or {}), "host": "0.0.0.0"}  # noqa: S104 (within a pod)
    nodes = [
        (pool.max, pod_resources.pod_size(spec, catalogue, index).gpus) for index, pool in enumerate(spec.gpu_pools)
    ]
    for service in (application["args"] for application in config["applications"]):
        _set_auth(spec, service)
        ingress = service.get("ingress") or {}
        service["ingress"] = {**ingress, "num_cpus": ingress.get("num_cpus") or 1}
        for model in service["models"]:
            _reserve_gpus(model, nodes)
    return config


def _set_auth(spec: ClusterSpec, service: Object) -> None:
    if service.get("auth") is None:
        if not spec.addons.network_policy:
            raise SpecError(
                [
                    Fault(
                        "serve.config",
                        "without addons.network_policy every pod of the cluster reaches the service: set `auth` in the "
                        "config (docs/configuration.md)",
                    )
                ]
            )
        service["auth"] = {"allow_anonymous": True}
    elif not service["auth"].get("allow_anonymous") and not (service.get("database") or {}).get("url"):
        message = (
            "`auth` needs `database.url`: without it the API keys are in a file of one pod and are lost with the pod"
        )
        raise SpecError([Fault("serve.config", message)])


def server_ports(config: Object) -> tuple[int, ...]:
    """The ports of the servers that the config names, each once: database, shared counters, response cache."""
    services = [application["args"] for application in config["applications"]]
    urls = [(service.get(section) or {}).get("url") for service in services for section in _SERVERS]
    servers = [urlsplit(url) for url in urls if url]
    ports = {one.port or _DEFAULT_PORTS.get(one.scheme.partition("+")[0]) for one in servers if one.hostname}
    return tuple(sorted(port for port in ports if port))


def _reserve_gpus(model: Object, nodes: list[tuple[int, int]]) -> None:
    """Set what a model on GPUs needs. `nodes` has the number of nodes of each pool, and the GPUs of one node."""
    if model.get("device", "auto") == "cpu":
        return
    resources = model.get("resources") or {}
    parsed = _Model.model_validate(model)
    total = _vllm_model(parsed).gpus if _uses_vllm(parsed) else 1
    reserved = resources["num_gpus"] = resources.get("num_gpus") or total
    _check_nodes(parsed.name, reserved, max(gpus for _, gpus in nodes))
    model |= {"device": "cuda", "resources": resources}
    deployment = model.get("deployment") or {}
    autoscaling = deployment.get("autoscaling") or {}
    if "num_replicas" not in deployment and autoscaling.get("max_replicas", 1) == 1:
        parts = sum(count * int(gpus / reserved) for count, gpus in nodes)
        autoscaling["max_replicas"] = max(1, parts // math.ceil(total / max(1, reserved)))
        model["deployment"] = {**deployment, "autoscaling": autoscaling}


def _check_nodes(name: str, reserved: float, most: int) -> None:
    if reserved > most:
        message = (
            f"{name} reserves {reserved:g} GPUs on one node, but a node has at most {most}: choose machines with more "
            f"GPUs, or, with vLLM, set resources.num_gpus to {most}, so that a replica uses several nodes"
        )
        raise SpecError([Fault("serve.config", message)])
