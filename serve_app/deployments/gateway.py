"""From a request to the right model, and from whatever happens there to errors of ours."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from prometheus_client.metrics_core import Metric
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.config import AppConfig, Model
from serve_app.core.events import Chunk, TokenEvent
from serve_app.core.http import HttpCall
from serve_app.core.queries import A, ModelState, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.deployments.hub import Pusher
from serve_app.deployments.registry import Heartbeat, RegistrySnapshot
from serve_app.errors import DeadlineExceeded, InternalError, NotReady, QueueFull, ServeAppError
from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.meter import IngressMetrics
from serve_app.telemetry.metrics import ages, hub_up, states

logger = logging.getLogger("ray.serve")

_LOOK_S = 0.5
_GRACE_S = 5.0
_BOARD_S = 2.0
# A request that reached its model sooner than this did not wait.
_NOW_S = 0.001

T = TypeVar("T")

# One model's tokens for one request. An error is the last thing it yields; closing it cancels the request.
Items: TypeAlias = AsyncGenerator[Chunk | ServeAppError, None]


@dataclass(frozen=True, slots=True)
class Backend:
    """The ways to one model."""

    generate: Callable[[GenerationRequest], Items]
    query: Callable[[Query[Any]], Awaitable[Any]]


class ReplicaGateway:
    """The Gateway of the HTTP layer, in a replica. Its models are `here`, in this process, or behind handles."""

    def __init__(
        self, config: AppConfig, backends: Mapping[str, Backend], hub: DeploymentHandle, replica: str, here: bool
    ) -> None:
        self._models = {model.name: model for model in config.models}
        self._backends = backends
        self._hub = hub
        self._replica = replica
        self._metrics = IngressMetrics(replica, self._models, config.telemetry.opentelemetry_metrics, alone=not here)
        # A model that is here was loaded before anybody could call: its state is no question.
        starting = (ModelState.READY, "") if here else (ModelState.LOADING, "starting")
        self._statuses = {name: ModelStatus(name, *starting) for name in self._models}
        self._replicas = dict.fromkeys(self._models, int(here))
        self._in_flight = dict.fromkeys(self._models, 0)
        self._mean_s = dict.fromkeys(self._models, 1.0)
        self._load_s: dict[str, float] = {}
        self._loading_since: dict[str, float] = {}
        self._waking_since: dict[str, float] = {}
        self._pusher = Pusher(hub, lambda: Heartbeat(replica, "", ""), self._families)
        self._looking = None if here else asyncio.create_task(self._look_for_ever())

    async def stream(self, request: GenerationRequest, warm_wait_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        """See Gateway.stream. Times in the chunks count from this call."""
        meter = self._metrics.meter(request)
        try:
            async with aclosing(self._chunks(request, meter.arrived, warm_wait_s)) as chunks:
                async for chunk in chunks:
                    meter.chunk(chunk)
                    yield chunk
        except ServeAppError as error:
            meter.failed(error)
            raise
        finally:
            seconds = meter.ended()
            if seconds is not None:
                self._mean_s[request.model] += 0.1 * (seconds - self._mean_s[request.model])

    async def query(self, model: str, question: Query[A], warm_wait_s: float) -> A:
        """See Gateway.ask."""
        arrived = time.monotonic()
        self._wake_or_refuse(self._models[model])
        answer, name = self._backends[model].query(question), type(question).__name__
        told = self._told(answer, model, name, arrived, warm_wait_s)
        item: A | ServeAppError = await self._once_awake(told, model, arrived, warm_wait_s)
        if isinstance(item, ServeAppError):
            raise item
        return item

    def waiting_on(self, model: str) -> str:
        return "queued" if self._statuses[model].state is ModelState.READY else "warming"

    async def models(self) -> list[ModelStatus]:
        return list(self._statuses.values())

    async def metrics(self) -> bytes:
        """Of this process at least: the hub may be starting or moving.

        This process goes the way of all others, so that no counter was ever higher at another ingress.
        """
        with suppress(Exception):
            async with asyncio.timeout(_BOARD_S):
                board, measured = await self._pusher.exchange()
                known = [(model, board.status(model), board.ready(model.name)) for model in self._models.values()]
                now = states((model.name, status.state, ready) for model, status, ready in known if status is not None)
                return exposition(measured.parts, [*ages(measured.ages), *now, hub_up(True)])
        return exposition([], [*self._families(), hub_up(False)])

    def _families(self) -> list[Metric]:
        return self._metrics.families(self._pusher.lag_s)

    def refused(self, error: ServeAppError, model: str | None) -> None:
        self._metrics.http.refused(error.code, model or "")

    def call_began(self) -> None:
        self._metrics.http.open.inc()

    def call_ended(self, call: HttpCall) -> None:
        self._metrics.http.open.dec()
        self._metrics.http.ended(call)

    async def _chunks(
        self, request: GenerationRequest, arrived: float, warm_wait_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks with times that count from `arrived` here, rather than from the model's door."""
        model = self._models[request.model]
        self._wake_or_refuse(model)
        self._refuse_when_full(model)
        self._in_flight[model.name] += 1
        try:
            async with aclosing(self._backends[model.name].generate(request)) as items:
                first = self._told(anext(items), model.name, request.id, arrived, request.deadline - arrived)
                item = await self._once_awake(first, model.name, arrived, warm_wait_s)
                offset = 0.0
                if isinstance(item, Chunk):
                    self._note(ModelStatus(model.name, ModelState.READY))  # no news is better than an answer
                    offset = time.monotonic() - arrived - item.events[-1].elapsed_s if item.events else 0.0
                while isinstance(item, Chunk):
                    yield _later(item, offset) if offset > _NOW_S else item
                    if item.finished:
                        return
                    item = await self._told(anext(items), model.name, request.id, arrived, request.deadline - arrived)
                raise item
        finally:
            self._in_flight[model.name] -= 1

    async def _once_awake(
        self, told: Coroutine[Any, Any, T], model: str, arrived: float, limit_s: float | None
    ) -> T | ServeAppError:
        """What a model says first. While there is no replica to say it, look up now and then whether one will come."""
        task = asyncio.ensure_future(told)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_S)
                status = self._statuses[model]
                too_long = limit_s is not None and time.monotonic() - arrived >= limit_s
                if task.done() or status.state is ModelState.READY:
                    continue
                if status.state is ModelState.FAILED or too_long:
                    return self._not_ready(status)
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})  # a generator that still runs cannot be closed

    async def _told(
        self, item: Awaitable[T], model: str, name: str, arrived: float, timeout_s: float
    ) -> T | ServeAppError:
        """What a model says, or an error of ours for whatever happened. `name` is the request's in the log.

        A model ends a request that is out of time by itself; this is for one that cannot.
        """
        try:
            async with asyncio.timeout(arrived + timeout_s + _GRACE_S - time.monotonic()):
                return await item
        except TimeoutError:
            return DeadlineExceeded(f"the request was not finished after {timeout_s:.0f} s")
        except StopAsyncIteration:
            return InternalError("the model ended this request without an answer")
        except BackPressureError:
            return self._full(model)
        except DeploymentUnavailableError:
            return NotReady(f"{model} is not available: its deployment failed", retry_after_s=30)
        except Exception as error:
            if isinstance(error, RayError) and not isinstance(error, RayTaskError):
                logger.error("replica lost with request %s: %s", name, error)
                return NotReady("the replica that served this request was lost; send it again", retry_after_s=1)
            logger.exception("the model failed on request %s", name)
            return InternalError("the model failed on this request")

    def _wake_or_refuse(self, model: Model) -> None:
        """A model that scales to zero is waited for. One that should be up is refused until it is."""
        status = self._statuses[model.name]
        if status.state is ModelState.ASLEEP:
            self._waking_since.setdefault(model.name, time.monotonic())
        if status.state is ModelState.FAILED or (
            status.state is ModelState.LOADING and not model.deployment.scales_to_zero
        ):
            raise self._not_ready(status)

    def _refuse_when_full(self, model: Model) -> None:
        """Ray looks before it counts, so that a burst passes its own bound; here nothing comes between."""
        room = self._replicas[model.name] * model.deployment.max_ongoing_requests
        if self._in_flight[model.name] >= room + model.deployment.max_queued_requests:
            raise self._full(model.name)

    def _full(self, model: str) -> QueueFull:
        return QueueFull(
            f"{model} has as many requests waiting as it takes; try again later",
            retry_after_s=max(1.0, self._mean_s[model]),
        )

    def _not_ready(self, status: ModelStatus) -> NotReady:
        """With an estimate from the last load of this model, less the time this one has run."""
        if status.state is ModelState.FAILED:
            return NotReady(f"{status.name} cannot be loaded; its operator will find why in the log", retry_after_s=60)
        usual = self._load_s.get(status.name, 30.0)
        ran = time.monotonic() - self._loading_since.get(status.name, time.monotonic())
        detail = f" ({status.detail})" if status.detail else ""
        return NotReady(
            f"{status.name} is being loaded{detail}; send the request again in a moment",
            retry_after_s=max(1.0, usual - ran),
        )

    async def look(self) -> None:
        """See what the models do. An ingress does so before it serves: it may be the next of one that knew."""
        try:
            async with asyncio.timeout(_BOARD_S):
                board = await self._board()
        except Exception:
            # The hub may be starting or moving; replicas go on serving, so the last look still holds.
            logger.debug("cannot read the board", exc_info=True)
            return
        for model in self._models.values():
            status = board.status(model)
            if status is not None:
                self._note(status)
                ready = board.ready(model.name)
                # A hub that began anew has not heard of all yet.
                self._replicas[model.name] = ready if board.complete else max(ready, self._replicas[model.name])

    async def leave(self) -> None:
        """Tell what was counted last: this process ends."""
        if self._looking is not None:
            self._looking.cancel()
        await self._pusher.stop(Heartbeat(self._replica, "", "", leaving=True))

    async def _look_for_ever(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    def _note(self, status: ModelStatus) -> None:
        """Keep a status, and learn from its changes how long this model takes to load, and to wake."""
        now = time.monotonic()
        before = self._statuses[status.name].state
        if status.state in (ModelState.READY, ModelState.FAILED) and status.name in self._waking_since:
            self._metrics.woke(status.name, now - self._waking_since.pop(status.name))
        elif before is ModelState.LOADING and status.state is ModelState.ASLEEP:
            self._waking_since.pop(status.name, None)  # nobody waits for it any more
        if status.state is ModelState.LOADING:
            self._loading_since.setdefault(status.name, now)
        else:
            since = self._loading_since.pop(status.name, None)
            if since is not None and status.state is ModelState.READY:
                self._load_s[status.name] = math.ceil(now - since)
        self._statuses[status.name] = status

    async def _board(self) -> RegistrySnapshot:
        board: RegistrySnapshot = await self._hub.board.remote()
        return board


def log_to_serve() -> None:
    """Let the records of the other rooms go where the replica's go."""
    ours = logging.getLogger("serve_app")
    ours.handlers, ours.propagate = logger.handlers, False
    ours.setLevel(logging.INFO)


def _later(chunk: Chunk, offset_s: float) -> Chunk:
    """A chunk as seen from a door that the request passed `offset_s` earlier."""
    events = tuple(
        TokenEvent(e.token_id, e.text, e.elapsed_s + offset_s, e.finish_reason, e.logprobs, e.stopped_by)
        for e in chunk.events
    )
    return replace(chunk, events=events, queue_s=chunk.queue_s + offset_s)
