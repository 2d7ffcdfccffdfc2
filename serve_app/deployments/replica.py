"""Deploys one model: runs its engine, admits requests in batches and sends their events to the ingress."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

from prometheus_client.metrics_core import Metric
from ray import serve

from serve_app.config import ConfigError, Model, Telemetry as TelemetrySettings, VllmOptions
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.core.routing import PrefixRecord, ReplicaLoad
from serve_app.core.scaling import RecentRate, ReplicaSpeed, Throughput
from serve_app.deployments import wire
from serve_app.deployments.event_receiver import ReplyAddress
from serve_app.deployments.event_sender import EventSender
from serve_app.deployments.heartbeats import Report, Reporter, to_every_replica
from serve_app.deployments.registry import Heartbeat
from serve_app.deployments.routing import Routed
from serve_app.deployments.telemetry import ProcessTelemetry, log_to_serve
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.sequence import Runner
from serve_app.engines.protocol import EngineStalled, ReplicaEngine
from serve_app.engines.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.errors import NotReady, ServeAppError
from serve_app.telemetry import libraries
from serve_app.telemetry.load_phases import LoadPhases
from serve_app.telemetry.metrics import EngineMetrics, StepSeries
from serve_app.telemetry.process import ProcessMetrics

# Ray Serve's logger writes to the replica's log, with the replica's ids.
logger = logging.getLogger("ray.serve")

READY = ""
# Threads for queries. Admission has its own thread, so that neither waits for the other.
_QUERY_THREADS = 2
# Every report of this number has all digests of prompts.
_FULL_REPORT = 15
# The time from Ray Serve's decision until the process of a replica runs its constructor.
_PROCESS_START_S = 3.0
# The time over which the tokens that the prefix cache saved are counted.
_CACHE_SPAN_S = 300.0


@serve.deployment
class ModelReplica:
    """One engine. Ray routes requests to this replica once `__init__` has returned, and calls `generate` for each."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, model: Model, telemetry: TelemetrySettings
    ) -> None:
        self._phases = LoadPhases()
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
        self._adapter_thread = ThreadPoolExecutor(1, "adapter")
        self._query_threads = ThreadPoolExecutor(_QUERY_THREADS, "query")
        self._admit.set_max_batch_size(model.batching.max_batch_size)
        self._streams: set[TokenStream] = set()
        self._engine = _make_engine(model, self._report, self._steps)
        self._reports, self._reported_version = 0, 0
        self._prompt_speed, self._answer_speed = Throughput(), Throughput()
        self._cache_hits, self._cached_tokens = RecentRate(_CACHE_SPAN_S), 0
        self._admitter = self._telemetry.admitter(self._engine)
        try:
            await asyncio.to_thread(self._engine.start)
        except BaseException as error:
            await self._reporter.stop(Heartbeat(self._id, model.name, f"{type(error).__name__}: {error}", failed=True))
            raise
        self._prefixes = PrefixRecord(self._engine.stats().kv_tokens)
        self._report(READY)
        self._metrics = EngineMetrics(model.name, self._id, self._engine, self._phases.seconds)
        await self._reporter.send()

    async def generate(self, request: GenerationRequest, address: ReplyAddress, routed: Routed) -> None:
        """Send the request's chunks, or the error that ends it, to the ingress at `address` as stream `routed.number`.

        Returns when the last chunk has been handed to the connection. A cancellation frees the slot of the request
        before the engine's next step. Raises NotReady if the ingress cannot be reached.
        """
        arrived = time.monotonic()
        try:
            connection = await self._events.connection(address)
        except (OSError, TimeoutError) as error:
            logger.error("the ingress at %s:%d cannot be reached: %s", address.host, address.port, error)
            raise NotReady("The model cannot reach the ingress. Send the request again.", None, 1.0) from None
        stream, number = self._admitter.open(wire.incoming(request, arrived)), routed.number
        connection.attach(number, stream)
        self._streams.add(stream)
        # The next batch reads this value. A request that is alone has no others to wait for.
        alone = len(self._streams) == 1
        self._admit.set_batch_wait_timeout_s(0 if alone else self._model.batching.batch_wait_timeout_s)
        try:
            refusal = await self._acquire_adapter(stream) or await self._admit(stream)
            if refusal is not None:
                connection.put(number, refusal)
                return
            await stream.wait_ended()
            connection.flush()
        finally:
            self._streams.remove(stream)
            if stream.started is not None:
                self._prefixes.add(routed.key.digests, stream.prompt_tokens)
            stream.close()
            connection.detach(number)

    async def _acquire_adapter(self, stream: TokenStream) -> ServeAppError | None:
        """Load the adapter that the request names, if any, or return why it cannot be used."""
        if stream.request.adapter is None:
            return None
        loop = asyncio.get_running_loop()
        loading = loop.run_in_executor(self._adapter_thread, self._engine.acquire_adapter, stream)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            await asyncio.wait([loading])  # the caller closes the stream, which releases the adapter
            raise

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
        self._reports = 0
        report = self._reporter.report()
        self._reports = 0  # the other ingresses do not get this report
        return report

    async def stats(self) -> dict[str, float]:
        """The engine's counters, for tests and inspection."""
        return asdict(self._engine.stats())

    async def __del__(self) -> None:
        await asyncio.to_thread(self._engine.stop)
        self._events.stop()
        await self._reporter.stop(Heartbeat(self._id, self._model.name, "", leaving=True))
        await asyncio.to_thread(self._telemetry.stop)

    def _report(self, stage: str) -> None:
        """Set the stage of the replica's start, "" when it is ready. Called from any thread."""
        self._stage = stage
        self._phases.begin(stage)
        if stage:
            logger.info("%s: %s", self._model.name, stage)

    def _heartbeat(self) -> Heartbeat:
        ready = self._metrics is not None
        return Heartbeat(self._id, self._model.name, self._stage, load=self._load() if ready else None)

    def _load(self) -> ReplicaLoad:
        """The load, with the digests if they have changed, and else now and then, because a report can be lost."""
        waiting = [stream.prompt_tokens for stream in self._streams if stream.started is None]
        version = self._prefixes.version
        changed = version != self._reported_version or self._reports % _FULL_REPORT == 0
        self._reported_version, self._reports = version, self._reports + 1
        running = len(self._streams) - len(waiting)
        digests = self._prefixes.digests() if changed else None
        return ReplicaLoad(running, sum(waiting), digests, self._speed(), self._engine.stats().slots)

    def _speed(self) -> ReplicaSpeed:
        now, stats = time.monotonic(), self._engine.stats()
        self._cache_hits.add(stats.cached_tokens - self._cached_tokens, now)
        self._cached_tokens = stats.cached_tokens
        return ReplicaSpeed(
            self._prompt_speed.observe(now, stats.prompt_tokens - stats.cached_tokens),
            self._answer_speed.observe(now, stats.generated_tokens),
            stats.tokens_held / stats.kv_tokens,
            sum(self._phases.seconds.values()) + _PROCESS_START_S,
            self._cache_hits.value(now),
        )

    def _families(self) -> list[Metric]:
        engine = self._metrics.families() if self._metrics else []
        of_libraries = libraries.families(self._model.name, self._id)
        return [*engine, *of_libraries, *self._steps.families(), *self._process.families(self._reporter.lag_s)]


def _make_engine(model: Model, report: Callable[[str], None], steps: StepSeries) -> ReplicaEngine:
    """The engine that the configuration names; for `auto` vLLM if it is installed and the replica has a GPU."""
    installed = find_spec("vllm") is not None
    if isinstance(model.engine, VllmOptions) or (model.may_use_vllm and installed):
        if not installed:
            raise ConfigError("engine.kind: vllm needs vLLM: install it as docs/deploy.md says, or use kind: native")
        from serve_app.engines.vllm.engine import VllmEngine

        return VllmEngine(model, report)
    return NativeEngine(
        partial(_make_runner, model, report), model.native_options, watch=steps.observe, lora=model.lora
    )


def _make_runner(model: Model, report: Callable[[str], None]) -> Runner:
    """Load the model, on the engine's thread. This is the only import of torch in this folder."""
    if model.is_toy:
        return ToyRunner.from_source(model.source, model.native_options)
    report("importing torch")
    from serve_app.engines.native.runner import TorchRunner

    return TorchRunner.from_config(model, report)
