"""The HTTP entrance of the graph."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.api.app import create_app
from serve_app.config import AppConfig
from serve_app.deployments.gateway import RayGateway


@serve.deployment
@serve.ingress()
class Ingress:
    """Hosts the Starlette app, with a gateway over the models' handles behind it."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: AppConfig, handles: list[DeploymentHandle], hub: DeploymentHandle
    ) -> None:
        context = serve.get_replica_context()
        by_name = {model.name: handle for model, handle in zip(config.models, handles, strict=True)}
        self._config = config
        self._gateway = RayGateway(config, by_name, hub, context.replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._gateway, self._config)
