"""The HTTP entrance of the graph, apart from its models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from starlette.types import ASGIApp

from serve_app.config import AppConfig
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.deployments.gateway import Backend, ReplicaGateway, log_to_serve
from serve_app.deployments.telemetry import Telemetry
from serve_app.errors import ServeAppError


@serve.deployment
@serve.ingress()
class Ingress:
    """Hosts the Starlette app, with a gateway over the models' handles behind it."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: AppConfig, handles: list[DeploymentHandle], hub: DeploymentHandle
    ) -> None:
        log_to_serve()
        replica = serve.get_replica_context().replica_id.unique_id
        backends = {model.name: _remote(handle) for model, handle in zip(config.models, handles, strict=True)}
        self._telemetry = Telemetry(config.telemetry, "", replica)
        self._config = config
        self._gateway = ReplicaGateway(config, backends, hub, replica, here=False)
        await self._gateway.look()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._telemetry.app(self._gateway, self._config)

    async def __del__(self) -> None:
        await self._gateway.leave()
        await asyncio.to_thread(self._telemetry.stop)


def _remote(handle: DeploymentHandle) -> Backend:
    """The model's replicas elsewhere. Leaving the generator before its last item cancels the request there."""
    model = handle.options(stream=True)

    async def generate(request: GenerationRequest) -> AsyncGenerator[Chunk | ServeAppError, None]:
        responses: DeploymentResponseGenerator = model.generate.remote(request)
        ended = False
        try:
            async for item in responses:
                ended = isinstance(item, ServeAppError) or item.finished
                yield item
            ended = True
        finally:
            if not ended:
                responses.cancel()

    async def query(question: Query[A]) -> A | ServeAppError:
        response: DeploymentResponse = handle.query.remote(question)
        try:
            return await response  # type: ignore[no-any-return]  # Ray's answers have no type
        except asyncio.CancelledError:
            response.cancel()
            raise

    return Backend(generate, query)
