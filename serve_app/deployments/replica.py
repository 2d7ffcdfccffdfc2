"""Deploys one model: runs its engine, admits requests in batches and sends their events to the ingress."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prometheus_client.metrics_core import Metric
from ray import serve

from serve_app.config import Model, Telemetry as TelemetrySettings
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.deployments import wire
from serve_app.deployments.event_receiver import ReplyAddress
from serve_app.deployments.event_sender import EventSender
from serve_app.deployments.heartbeats import Report, Reporter, to_every_replica
from serve_app.deployments.registry import Heartbeat
from serve_app.deployments.telemetry import ProcessTelemetry, log_to_serve
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.sequence import Runner
from serve_app.engines.protocol import EngineStalled, ReplicaEngine
from serve_app.engines.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.errors import NotReady, ServeAppError
from serve_app.telemetry.metrics import EngineMetrics, StepSeries
from serve_app.telemetry.process import ProcessMetrics

# Ray Serve's logger writes to the replica's log, with the replica's ids.
logger = logging.getLogger("ray.serve")

READY = ""
# Threads for queries. Admission has its own thread, so that neither waits for the other.
_QUERY_THREADS = 2


@serve.deployment
class ModelReplica:
    """One engine. Ray routes requests to this replica once `__init__` has returned, and calls `generate` for each."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, model: Model, telemetry: TelemetrySettings
    ) -> None:
        began = time.monotonic()
        self._model = model
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._stage = "starting"
        log_to_serve()
        self._telemetry = ProcessTelemetry(telemetry, model.name, self._id)
        self._steps = StepSeries(model.name, self._id)
        self._process = ProcessMetrics(model.name, self._id)
        self._metrics: EngineMetrics | None = None
        ingress = serve.get_deployment_handle("Ingress", context.app_name)
        self._reporter = Reporter(to_every_replica(ingress, "push"), self._heartbeat, self._families)
        self._events = EventSender(model.engine.flush_interval_s)
        self._admission_thread = ThreadPoolExecutor(1, "admission")
        self._query_threads = ThreadPoolExecutor(_QUERY_THREADS, "query")
        self._admit.set_max_batch_size(model.batching.max_batch_size)
        self._open_requests = 0
        self._engine: ReplicaEngine = NativeEngine(
            partial(_make_runner, model, self._report), model.engine, watch=self._steps.observe
        )
        self._admitter = self._telemetry.admitter(self._engine)
        try:
            await asyncio.to_thread(self._engine.start)
        except BaseException as error:
            await self._reporter.stop(Heartbeat(self._id, model.name, f"{type(error).__name__}: {error}", failed=True))
            raise
        self._metrics = EngineMetrics(model.name, self._id, self._engine, time.monotonic() - began)
        self._report(READY)
        await self._reporter.send()

    async def generate(self, request: GenerationRequest, number: int, address: ReplyAddress) -> None:
        """Send the request's chunks, or the error that ends it, to the ingress at `address` as stream `number`.

        Returns when the last chunk has been handed to the connection. A cancellation frees the slot of the request
        before the engine's next step. Raises NotReady if the ingress cannot be reached.
        """
        arrived = time.monotonic()
        try:
            connection = await self._events.connection(address)
        except (OSError, TimeoutError) as error:
            logger.error("the ingress at %s:%d cannot be reached: %s", address.host, address.port, error)
            raise NotReady("The model cannot reach the ingress. Send the request again.", None, 1.0) from None
        stream = self._admitter.open(wire.incoming(request, arrived))
        connection.attach(number, stream)
        self._open_requests += 1
        # The next batch reads this value. A request that is alone has no others to wait for.
        alone = self._open_requests == 1
        self._admit.set_batch_wait_timeout_s(0 if alone else self._model.batching.batch_wait_timeout_s)
        try:
            refusal = await self._admit(stream)
            if refusal is not None:
                connection.put(number, refusal)
                return
            await stream.wait_ended()
            connection.flush()
        finally:
            self._open_requests -= 1
            stream.close()
            connection.detach(number)

    async def query(self, query: Query[A]) -> A | ServeAppError:
        """The result of a query. An error is returned and not raised, because Ray would wrap a raised one."""
        return await asyncio.get_running_loop().run_in_executor(self._query_threads, self._engine.answer, query)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0)  # __init__ and generate set these from the configuration
    async def _admit(self, streams: list[TokenStream]) -> list[ServeAppError | None]:
        """Admit requests to the engine together. Returns the error, or None, of each.

        An exception here would fail all requests of the batch, therefore the engine's `admit` returns errors.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._admission_thread, self._admitter.admit, streams)

    async def check_health(self) -> None:
        """Raises EngineStalled if the engine has ended, fails or does not finish a step. Ray replaces the replica."""
        self._engine.check()
        age, limit = self._engine.step_age(), self._model.deployment.health_check_timeout_s
        if age > limit:
            raise EngineStalled(f"a step has been running for {age:.0f} s, longer than {limit:.0f} s")

    async def report(self) -> Report:
        """The heartbeat and the metrics of this replica. An ingress calls it when it starts."""
        return self._reporter.report()

    async def stats(self) -> dict[str, float]:
        """The engine's counters, for tests and inspection."""
        stats = self._engine.stats()
        return {name: getattr(stats, name) for name in stats.__slots__}

    async def __del__(self) -> None:
        await asyncio.to_thread(self._engine.stop)
        self._events.stop()
        await self._reporter.stop(Heartbeat(self._id, self._model.name, "", leaving=True))
        await asyncio.to_thread(self._telemetry.stop)

    def _report(self, stage: str) -> None:
        """Set the stage of the replica's start, "" when it is ready. Called from any thread."""
        self._stage = stage
        if stage:
            logger.info("%s: %s", self._model.name, stage)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._id, self._model.name, self._stage)

    def _families(self) -> list[Metric]:
        engine = self._metrics.families() if self._metrics else []
        return [*engine, *self._steps.families(), *self._process.families(self._reporter.lag_s)]


def _make_runner(model: Model, report: Callable[[str], None]) -> Runner:
    """Load the model, on the engine's thread. This is the only import of torch in this folder."""
    if model.source.startswith("builtin:toy"):
        return ToyRunner.from_source(model.source, model.engine)
    report("importing torch")
    from serve_app.engines.native.runner import TorchRunner

    return TorchRunner.from_config(model, report)
