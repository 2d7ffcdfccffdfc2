"""Builds the deployment graph: `import_path: serve_app.app:build` in serve_config.yaml."""

# Without `from __future__ import annotations`: Ray validates the args by the annotation of `build`, and silently does
# not if the annotation is a string.
from collections.abc import Callable
from typing import Any

from ray.serve import Application

from serve_app.config import AppConfig, Autoscaling, Deployment, Model, VllmOptions, deployment_name
from serve_app.deployments.autoscaling import model_autoscaling, ray_autoscaling
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.replica import ModelReplica
from serve_app.deployments.router import router_config
from serve_app.deployments.telemetry import check
from serve_app.gateway.admission import QUERIES_RUNNING

# The deployment of a model that cannot be loaded fails after so many tries. Ray's default is 20.
_CONSTRUCTOR_TRIES = 3
# Ray learns of the end of a request a moment after the gateway, which has sent the next one by then.
_SPARE = 32
# A node of a type has this resource; a reservation selects the node by any part of it.
_ANY_AMOUNT = 0.001
_NO_ACCESS_LOG = {"enable_access_log": False}


def build(config: AppConfig) -> Application:
    """An ingress in front of one deployment per model. Ray Serve adds the `user_config` of the file."""
    return build_with(config, None)


def build_with(config: AppConfig, user_config: dict[str, Any] | None) -> Application:
    """The application with the `user_config` of the ingress, for a program that deploys it itself."""
    assert isinstance(config, AppConfig), "Ray did not validate the args of serve_config.yaml"
    check(config.telemetry)
    models = [_model(model, config).bind(model, config.telemetry) for model in config.models]
    ingress = Ingress.options(  # type: ignore[attr-defined]
        **_serve_options(config.ingress.deployment, ray_autoscaling),
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        user_config=user_config,
        # With JSON logs the ingress writes its own access log, with route, trace and the status after the stream.
        **({"logging_config": _NO_ACCESS_LOG} if config.telemetry.log_format == "json" else {}),
    )
    return ingress.bind(config, models)


def _model(model: Model, config: AppConfig) -> Any:
    """The gateway enforces the bounds of generations and queries. Ray's bounds are higher, so that they never apply."""
    options = _serve_options(model.deployment, lambda scaling: model_autoscaling(model, scaling))
    ingresses = config.ingress.deployment.most_replicas
    options["max_ongoing_requests"] += ingresses * QUERIES_RUNNING + _SPARE
    options["max_queued_requests"] += model.deployment.most_replicas * options["max_ongoing_requests"]
    return ModelReplica.options(  # type: ignore[attr-defined]
        name=deployment_name(model.name),
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        logging_config=_NO_ACCESS_LOG,  # the ingress writes one line per HTTP request
        request_router_config=router_config(),
        **_resource_options(model),
        **options,
    )


def _serve_options(deployment: Deployment, configured: Callable[[Autoscaling], dict[str, Any]]) -> dict[str, Any]:
    options = deployment.model_dump(exclude={"autoscaling", "num_replicas"})
    if deployment.autoscaling is None:
        return {**options, "num_replicas": deployment.num_replicas}
    return {**options, "autoscaling_config": configured(deployment.autoscaling)}


def _resource_options(model: Model) -> dict[str, Any]:
    """What a replica reserves: resources of one node, or a placement group if its GPUs are on several nodes."""
    resources = model.resources
    if isinstance(model.engine, VllmOptions) and model.engine.gpus > max(1, resources.num_gpus):
        return _placement_group(model.engine.gpus, resources.num_cpus, resources.accelerator_type)
    options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.accelerator_type is not None:
        options["accelerator_type"] = resources.accelerator_type
    return {"ray_actor_options": options}


def _placement_group(gpus: int, num_cpus: float, accelerator_type: str | None) -> dict[str, Any]:
    """One bundle for each GPU, on as few nodes as possible. The replica is in the first bundle and uses no GPU itself.

    vLLM starts a worker in each bundle: it finds the placement group of the replica.
    """
    bundle = {"GPU": 1.0}
    if accelerator_type is not None:
        bundle[f"accelerator_type:{accelerator_type}"] = _ANY_AMOUNT
    first = {"CPU": num_cpus, **bundle} if num_cpus else bundle
    return {
        "ray_actor_options": {"num_cpus": num_cpus, "num_gpus": 0},
        "placement_group_bundles": [first, *[bundle] * (gpus - 1)],
        "placement_group_strategy": "PACK",
    }
