"""One replica of one model, in the two shapes of the graph: called by the ingress, or its own ingress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.config import AppConfig
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.deployments.gateway import Backend, ReplicaGateway
from serve_app.deployments.worker import Worker
from serve_app.errors import ServeAppError


@serve.deployment
class Replica(Worker):
    """Behind an ingress, called through its handle."""


@serve.deployment
@serve.ingress()
class FusedReplica(Worker):
    """Hosts the Starlette app in the model's own process, so that tokens cross no border on their way to the proxy.

    Ray sends requests here once `__init__` has returned, that is once the model can answer.
    """

    _gateway: ReplicaGateway | None = None

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: AppConfig, hub: DeploymentHandle
    ) -> None:
        (model,) = config.models
        await super().__init__(model, hub, config.telemetry)
        self._config = config
        # Behind an ingress Ray lets no more than these in; here it lets everybody in who wants to speak to the app.
        self._room = asyncio.Semaphore(model.deployment.max_ongoing_requests)
        self._gateway = ReplicaGateway(
            config, {model.name: Backend(self._in_turn, self.query)}, hub, self._id, here=True
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        assert self._gateway is not None, "Ray builds the app once the replica is there"
        return self._telemetry.app(self._gateway, self._config)

    async def __del__(self) -> None:
        await super().__del__()
        if self._gateway is not None:  # else the model could not be loaded
            await self._gateway.leave()

    async def _in_turn(self, request: GenerationRequest) -> AsyncGenerator[Chunk | ServeAppError, None]:
        async with self._room, aclosing(self.generate(request)) as items:
            async for item in items:
                yield item
