"""Deploys the HTTP application, with the gateway's stages in front of the model deployments."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.context import configured_adapters
from serve_app.config import AppConfig, Model
from serve_app.core.adapters import AdapterChange
from serve_app.core.experiments import Feedback
from serve_app.core.queries import ModelState
from serve_app.deployments.access import SERVICE, Access
from serve_app.deployments.event_receiver import EventReceiver
from serve_app.deployments.experiments import IngressExperiments
from serve_app.deployments.heartbeats import Report, Reporter, to_every_replica
from serve_app.deployments.http_protocol import LIMITS
from serve_app.deployments.ingress_telemetry import IngressTelemetry
from serve_app.deployments.jobs import IngressJobs
from serve_app.deployments.registry import Heartbeat, ReplicaRegistry
from serve_app.deployments.remote import RemoteEngine
from serve_app.deployments.routing import routing_table
from serve_app.deployments.telemetry import ProcessTelemetry, log_to_serve
from serve_app.deployments.work_reporter import WorkReporter
from serve_app.deployments.work_reports import WorkReport
from serve_app.gateway.catalog import Catalog
from serve_app.gateway.chain import ModelChain
from serve_app.gateway.experiment_state import Changes
from serve_app.gateway.response_cache import open_cache
from serve_app.telemetry.exposition import MetricsSnapshot

if TYPE_CHECKING:
    from serve_app.deployments.ingress_quotas import IngressQuotas

logger = logging.getLogger("ray.serve")

# The time for which a new ingress waits for the reports of running replicas before it serves.
_FIRST_REPORTS_S = 1.0
_UPDATE_INTERVAL_S = 0.5
# The interval while requests wait for a model to load.
_WAKING_INTERVAL_S = 0.05


@serve.deployment
@serve.ingress()
class Ingress:
    """Serves HTTP, even while no model is loaded. Every process of the service reports to every ingress."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: AppConfig, handles: list[DeploymentHandle]
    ) -> None:
        log_to_serve()
        context = serve.get_replica_context()
        self._config = config
        self._id = context.replica_id.unique_id
        self._process = ProcessTelemetry(config.telemetry, "", self._id)
        self._registry = ReplicaRegistry()
        self._adapters = configured_adapters(config)
        self._receiver = EventReceiver(ray.util.get_node_ip_address())
        await self._receiver.start()
        self._telemetry = IngressTelemetry(config, self._id, self._registry)
        LIMITS.max_body_bytes = config.limits.max_body_bytes
        LIMITS.stalled_client_s = config.limits.stalled_client_s
        LIMITS.refused = partial(self._telemetry.refused, model=None)
        self._access = Access(config, self._telemetry)
        await self._access.start()
        self._quotas = open_quotas(config, self._id, self._telemetry)
        self._shared_quotas = await self._quotas.start(self._access.tenants) if self._quotas else None
        self._cache = open_cache(config.response_cache, self._telemetry.cache) if config.response_cache else None
        self._handles = {model.name: handle for model, handle in zip(config.models, handles, strict=True)}
        self._remotes: list[RemoteEngine] = []
        self._chains = {model.name: self._chain(model) for model in config.models}
        self._ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        self._work = WorkReporter(context.app_name, self._id, config.models, self._report_of)
        catalog = Catalog({name: chain.engine for name, chain in self._chains.items()})
        self._experiments = IngressExperiments(
            config, self._id, catalog, self._adapters, self._telemetry.experiments, self._ask_ingresses, self._stopped
        )
        self._jobs = IngressJobs(config, self._id, self._telemetry)
        self._reporter = Reporter(self._report, self._heartbeat, self._telemetry.families)
        self._telemetry.reporter = self._reporter
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_REPORTS_S):
                await asyncio.gather(
                    *map(self._collect_reports, handles), self._collect_adapters(), self._experiments.exchange()
                )
        self._update()
        self._updates = asyncio.create_task(self._update_forever())
        self._experiments.start()
        self._jobs.start(self._experiments.stage, self._adapters, self._experiments)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = self._process.app(
            self._experiments.stage,
            self._telemetry,
            self._config,
            self._adapters,
            self._reporter.send,
            self._experiments,
            self._access.authenticator,
            self._access.audit,
            self._quotas,
            self._jobs.service,
            self._jobs.answers,
        )
        return with_disconnects(app)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray Serve calls it with the `user_config` of the file: at the start, and after each change of it."""
        await self._experiments.configure(user_config)

    async def experiment_changes(self, known: dict[str, int]) -> Changes:
        """What an ingress that knows these versions of the statistics does not know yet."""
        return self._experiments.state.changes(known)

    async def experiment_feedback(self, feedback: Feedback) -> bool:
        """Count feedback on a call of this ingress; False if it does not know the call."""
        return self._experiments.stage.take_feedback(feedback)

    async def push(self, heartbeat: Heartbeat, metrics: MetricsSnapshot) -> None:
        """Receive the report of another process."""
        self._take((heartbeat, metrics))

    def _take(self, report: Report) -> None:
        """Keep the report of any process, this one included."""
        heartbeat, metrics = report
        self._registry.take(heartbeat, metrics)
        self._adapters.merge(heartbeat.adapters)
        if heartbeat.leaving or heartbeat.failed:
            routing_table(heartbeat.model).left(heartbeat.replica, time.monotonic())
        elif heartbeat.load is not None:
            routing_table(heartbeat.model).report(heartbeat.replica, heartbeat.load, time.monotonic())

    async def adapter_changes(self) -> tuple[AdapterChange, ...]:
        """The adapters that were loaded or unloaded at run time. A new ingress calls it when it starts."""
        return self._adapters.changes

    async def __del__(self) -> None:
        self._updates.cancel()
        self._experiments.stop()
        await self._jobs.stop()
        for chain in self._chains.values():
            chain.stop()
        await self._work.stop()
        if self._cache is not None:
            await self._cache.store.close()
        await self._reporter.stop(Heartbeat(self._id, "", "", leaving=True))
        self._receiver.stop()
        if self._quotas is not None:
            await self._quotas.stop()
        await self._access.stop()
        await asyncio.to_thread(self._process.stop)

    def _chain(self, model: Model) -> ModelChain:
        table = routing_table(model.name)
        remote = RemoteEngine(model.name, self._handles[model.name], self._receiver, table)
        self._remotes.append(remote)
        telemetry, name = self._telemetry, model.name
        resumed, arrived = partial(telemetry.resumed, name), partial(self._arrived, name)
        woke = partial(telemetry.woke, name)
        chain = ModelChain(
            model,
            remote,
            telemetry.meter,
            woke,
            resumed,
            arrived,
            self._cache,
            self._shared_quotas,
            self._access.tenants,
            telemetry.queue_meter(name),
        )
        telemetry.watch_queue(name, lambda: chain.engine.load(name).waiting)
        return chain

    def _arrived(self, model: str) -> None:
        """A request has arrived. The autoscaler learns of it at once if the model has no replica."""
        if self._chains[model].engine.health(model).state is not ModelState.READY:
            self._work.send_soon(model)

    def _report_of(self, model: str) -> WorkReport:
        """What the autoscaler needs to know of a model."""
        loads = {one.replica: one.load for one in self._registry.snapshot().heartbeats if one.model == model}
        speeds = {replica: load.speed for replica, load in loads.items() if load is not None}
        return WorkReport(self._chains[model].demand(), speeds)

    async def _collect_reports(self, handle: DeploymentHandle) -> None:
        """Get the reports of running replicas, so that the first requests do not wait for the next ones."""
        try:
            reports: list[Report] = await handle.broadcast("report").results_async(timeout_s=_FIRST_REPORTS_S)
            for report in reports:
                self._take(report)
        except Exception:
            logger.debug("the replicas did not report", exc_info=True)

    async def _collect_adapters(self) -> None:
        """Get the adapters that the other ingresses know."""
        try:
            found = self._ingresses.broadcast("adapter_changes").results_async(timeout_s=_FIRST_REPORTS_S)
            for changes in await found:
                self._adapters.merge(changes)
        except Exception:
            logger.debug("the other ingresses did not answer", exc_info=True)

    async def _ask_ingresses(self, method: str, argument: object) -> list[Any]:
        """The results of a method of the other ingresses, without those that do not answer in time."""
        if routed_replicas(self._ingresses) == {self._id}:
            return []
        calls = self._ingresses.broadcast(method, argument)
        found = await calls.results_async(timeout_s=_FIRST_REPORTS_S, return_exceptions=True)
        return [one for one in found if not isinstance(one, BaseException)]

    async def _stopped(self, experiment: str, reason: str) -> None:
        """An experiment was stopped by its guards."""
        await self._access.audit(SERVICE, "experiments.stop", experiment, {"reason": reason})

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._id, "", "", adapters=self._adapters.changes)

    async def _report(self, report: Report) -> None:
        """Report to this ingress and to the other ingresses."""
        self._take(report)
        if (routed_replicas(self._ingresses) or {self._id}) != {self._id}:
            await to_every_replica(self._ingresses, "push")(report)

    async def _update_forever(self) -> None:
        while True:
            began = time.monotonic()
            waking = any(chain.holds for chain in self._chains.values())
            await asyncio.sleep(_WAKING_INTERVAL_S if waking else _UPDATE_INTERVAL_S)
            try:
                self._update()
                # Otherwise this process stood still, and reports of the replicas wait to be read.
                if time.monotonic() - began < 2 * _UPDATE_INTERVAL_S:
                    for remote in self._remotes:
                        remote.end_silent()
            except Exception:
                logger.exception("the state of the models could not be updated")

    def _update(self) -> None:
        """Pass the state of each model from the registry to its stages and metrics."""
        state = self._registry.snapshot()
        for model in self._config.models:
            routed = routed_replicas(self._handles[model.name])
            status = state.status(model, routed)
            if status is not None:
                ready = state.ready(model.name, routed)
                self._chains[model.name].update(status, ready, state.ingresses, state.slots(model.name))
                self._telemetry.set_status(status, ready)


def open_quotas(config: AppConfig, ingress: str, telemetry: IngressTelemetry) -> IngressQuotas | None:
    """The limits and the usage of keys; None without keys, when the package of the database is not imported."""
    if not config.checks_keys:
        return None
    from serve_app.deployments.ingress_quotas import IngressQuotas

    return IngressQuotas(config, ingress, telemetry.quotas)


def routed_replicas(handle: DeploymentHandle) -> Collection[str] | None:
    """The ids of the replicas to which Ray routes requests, without draining replicas; None if they are unknown.

    Ray has no public interface for these ids.
    """
    try:
        if not handle.running_replicas_populated():
            return None
        replicas = handle._router._asyncio_router._active_request_router.curr_replicas
    except AttributeError:
        return None
    return {replica.unique_id for replica in replicas}


def with_disconnects(app: ASGIApp) -> ASGIApp:
    """The application behind Ray's own proxy, whose `receive` can raise a RayError when a client has disconnected."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await app(scope, receive_or_disconnect, send)

    return wrapped
