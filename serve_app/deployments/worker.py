"""One engine and the way in and out of it: admission by `@serve.batch`, then a stream of tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import Model, Telemetry as TelemetrySettings
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.deployments.gateway import log_to_serve
from serve_app.deployments.hub import Pusher
from serve_app.deployments.registry import Heartbeat
from serve_app.deployments.telemetry import Telemetry
from serve_app.engines.native.engine import EngineStalled, NativeEngine
from serve_app.engines.native.sequence import Runner
from serve_app.engines.native.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.errors import ServeAppError
from serve_app.telemetry.metrics import EngineMetrics, StepSeries
from serve_app.telemetry.process import ProcessMetrics

# Ray Serve's logger: what is written here stands in the replica's log, with its ids.
logger = logging.getLogger("ray.serve")

READY = ""


class Worker:
    """What a deployment of a model inherits, whether it is called through handles or hosts the HTTP entrance too."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, model: Model, hub: DeploymentHandle, telemetry: TelemetrySettings
    ) -> None:
        began = time.monotonic()
        self._model = model
        self._id = serve.get_replica_context().replica_id.unique_id
        self._stage = "starting"
        log_to_serve()
        self._telemetry = Telemetry(telemetry, model.name, self._id)
        self._steps = StepSeries(model.name, self._id)
        self._process = ProcessMetrics(model.name, self._id)
        self._metrics: EngineMetrics | None = None
        self._pusher = Pusher(hub, self._notice, self._families)
        self._admit.set_max_batch_size(model.batching.max_batch_size)
        self._admit.set_batch_wait_timeout_s(model.batching.batch_wait_timeout_s)
        self._engine = NativeEngine(partial(_make_runner, model, self._report), model.engine, watch=self._steps.saw)
        self._turnstile = self._telemetry.turnstile(self._engine)
        try:
            await asyncio.to_thread(self._engine.start)
        except BaseException as error:
            await self._pusher.stop(Heartbeat(self._id, model.name, f"{type(error).__name__}: {error}", failed=True))
            raise
        self._metrics = EngineMetrics(model.name, self._id, self._engine, time.monotonic() - began)
        self._report(READY)
        await self._pusher.push()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk | ServeAppError, None]:
        """Yield the request's tokens; an error is the last thing yielded, never raised, so that none loses its type.

        Closing the generator, or cancelling it at any point, frees the request's slot before the next step.
        """
        stream = self._turnstile.open(request)
        try:
            refusal = await self._admit(stream)
            if refusal is not None:
                yield refusal
                return
            async for chunk in stream.chunks(self._model.engine.flush_interval_s):
                yield chunk
        except ServeAppError as error:
            yield error
        finally:
            stream.close()

    async def query(self, question: Query[A]) -> A | ServeAppError:
        """What the question's class promises; an error is returned, never raised, so that none loses its type."""
        return await asyncio.to_thread(self._engine.answer, question)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0)  # both are set from the configuration
    async def _admit(self, streams: list[TokenStream]) -> list[ServeAppError | None]:
        """The turnstile: lets requests in together and returns at once; the engine batches from there on.

        One outcome each, and it never raises: an exception here would hit every request of the batch.
        """
        return await asyncio.to_thread(self._turnstile.admit, streams)

    async def check_health(self) -> None:
        """Ray replaces the replica when this raises: engine ended, failing or stalled."""
        self._engine.check()
        age, limit = self._engine.step_age(), self._model.deployment.health_check_timeout_s
        if age > limit:
            raise EngineStalled(f"a step has been running for {age:.0f} s, more than {limit:.0f} s")

    async def stats(self) -> dict[str, float]:
        """The engine's counters, for tests and inspection."""
        stats = self._engine.stats()
        return {name: getattr(stats, name) for name in stats.__slots__}

    async def __del__(self) -> None:
        await asyncio.to_thread(self._engine.stop)
        await self._pusher.stop(Heartbeat(self._id, self._model.name, "", leaving=True))
        await asyncio.to_thread(self._telemetry.stop)

    def _report(self, stage: str) -> None:
        """From any thread: what this replica is doing until it can answer."""
        self._stage = stage
        if stage:
            logger.info("%s: %s", self._model.name, stage)

    def _notice(self) -> Heartbeat:
        return Heartbeat(self._id, self._model.name, self._stage)

    def _families(self) -> list[Metric]:
        engine = self._metrics.families() if self._metrics else []
        return [*engine, *self._steps.families(), *self._process.families(self._pusher.lag_s)]


def _make_runner(model: Model, report: Callable[[str], None]) -> Runner:
    """On the engine's thread. torch is imported here and nowhere else in this room."""
    if model.source.startswith("builtin:toy"):
        return ToyRunner.from_source(model.source, model.engine)
    report("importing torch")
    from serve_app.engines.native.runner import TorchRunner

    return TorchRunner.from_config(model, report)
