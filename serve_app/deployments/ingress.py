"""The deployment that answers HTTP: the Starlette app over the gateway's stages over the models' handles."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import partial

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.config import AppConfig, Model
from serve_app.deployments.events import EventReceiver
from serve_app.deployments.hub import HeartbeatSender
from serve_app.deployments.ingress_telemetry import IngressTelemetry
from serve_app.deployments.registry import Heartbeat, RegistrySnapshot
from serve_app.deployments.remote import RemoteEngine
from serve_app.deployments.telemetry import ProcessTelemetry, log_to_serve
from serve_app.gateway.catalog import Catalog
from serve_app.gateway.chain import ModelChain

_FIRST_LOOK_S = 2.0


@serve.deployment
@serve.ingress()
class Ingress:
    """Serves HTTP, also while no model is loaded."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: AppConfig, handles: list[DeploymentHandle], hub: DeploymentHandle
    ) -> None:
        log_to_serve()
        self._config = config
        self._id = serve.get_replica_context().replica_id.unique_id
        self._process = ProcessTelemetry(config.telemetry, "", self._id)
        self._receiver = EventReceiver(ray.util.get_node_ip_address())
        await self._receiver.start()
        self._telemetry = IngressTelemetry(config, self._id)
        self._handles = {model.name: handle for model, handle in zip(config.models, handles, strict=True)}
        self._chains = {model.name: self._chain(model) for model in config.models}
        self._heartbeats = HeartbeatSender(
            hub, lambda: Heartbeat(self._id, "", ""), self._telemetry.families, self._update
        )
        self._telemetry.heartbeats = self._heartbeats
        await asyncio.wait([asyncio.create_task(self._heartbeats.send())], timeout=_FIRST_LOOK_S)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        engine = Catalog({name: chain.engine for name, chain in self._chains.items()})
        return self._process.app(engine, self._telemetry, self._config)

    async def __del__(self) -> None:
        for chain in self._chains.values():
            chain.stop()
        await self._heartbeats.stop(Heartbeat(self._id, "", "", leaving=True))
        self._receiver.stop()
        await asyncio.to_thread(self._process.stop)

    def _chain(self, model: Model) -> ModelChain:
        remote = RemoteEngine(model.name, self._handles[model.name], self._receiver)
        return ModelChain(model, remote, self._telemetry.meter, partial(self._telemetry.woke, model.name))

    def _update(self, state: RegistrySnapshot) -> None:
        """Pass on what the registry reports about each model."""
        for model in self._config.models:
            routed = routed_replicas(self._handles[model.name])
            status = state.status(model, routed)
            if status is not None:
                self._chains[model.name].update(status, state.ready(model.name, routed), state.ingresses)
                self._telemetry.saw(status, state.ready(model.name, routed))


def routed_replicas(handle: DeploymentHandle) -> Collection[str] | None:
    """The ids of the replicas to which Ray routes requests, draining ones excluded; None if Ray does not say.

    Ray has no public interface for it.
    """
    try:
        replicas = handle._router._asyncio_router._active_request_router.curr_replicas
        return {replica.unique_id for replica in replicas}
    except AttributeError:
        return None
