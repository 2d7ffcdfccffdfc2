"""An Engine that sends requests to the replicas of a model: one Ray call per request, with the events over a socket."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve_app.core.engine import EngineLoad
from serve_app.core.events import Chunk
from serve_app.core.queries import A, ModelState, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.core.routing import routing_key
from serve_app.deployments import wire
from serve_app.deployments.event_receiver import EventReceiver, Inbox, replica_lost
from serve_app.deployments.routing import Routed
from serve_app.errors import InternalError, NotReady, QueueFull, ServeAppError, deadline_exceeded
from serve_app.gateway.routing_table import RoutingTable

logger = logging.getLogger("ray.serve")

# A replica ends a request at the deadline, with the number of its tokens in the message. If a step takes longer than
# this additional time, the ingress ends the request.
_GRACE_S = 0.1
# The result of a Ray call can arrive before the last events, because events have their own connection.
_LAST_EVENTS_S = 5.0
# Replicas report once a second. The requests of a replica that has not reported for this time are ended.
HANG_S = 10.0


class RemoteEngine:
    """Calls the replicas of `model` through `handle`. Closing a generator before its last chunk cancels the request.

    The `table` chooses the replica. The call stays open until the request has ended there, so that Ray counts the
    request as ongoing. `receiver` receives its events.
    """

    def __init__(self, model: str, handle: DeploymentHandle, receiver: EventReceiver, table: RoutingTable) -> None:
        self._model = model
        self._handle = handle
        self._receiver = receiver
        self._table = table
        self._open: dict[int, Inbox] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        number, inbox = self._receiver.open(request.arrived)
        now = time.monotonic()
        routed = Routed(number, routing_key(request))
        self._table.opened(number)
        response = self._handle.generate.remote(wire.outgoing(request, now), self._receiver.address, routed)
        call = asyncio.create_task(self._follow(response, inbox, request.id))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        late = asyncio.get_running_loop().call_later(
            request.deadline + _GRACE_S - now, lambda: inbox.put(deadline_exceeded(request.timeout_s))
        )
        self._open[number] = inbox
        began = ended = False
        try:
            while not ended:
                item = await inbox.get()
                if isinstance(item, ServeAppError):
                    if isinstance(item, NotReady) and (replica := self._table.assigned(number)):
                        (self._table.lost if inbox.lost else self._table.avoid)(replica, time.monotonic())
                    raise item
                if not began:
                    self._table.began(number)
                began, ended = True, item.finished
                yield item
        finally:
            del self._open[number]
            self._table.ended(number)
            late.cancel()
            self._receiver.close(number)
            if not ended:
                response.cancel()

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        response: DeploymentResponse = self._handle.query.remote(query)
        try:
            result: Any = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise self._mapped(error, type(query).__name__) from error
        if isinstance(result, ServeAppError):
            raise result
        return result  # type: ignore[no-any-return]  # Ray's results have no type

    def health(self, model: str) -> ModelStatus:
        return ModelStatus(self._model, ModelState.READY)

    def load(self, model: str) -> EngineLoad:
        return EngineLoad(len(self._open), 0, len(self._open))

    def end_silent(self) -> None:
        """End the requests whose replica has not reported for HANG_S seconds: it hangs, or its node is lost."""
        now, hang = time.monotonic(), set[str]()
        for number, inbox in self._open.items():
            replica = self._table.assigned(number)
            if replica and self._table.silent(replica, now, HANG_S):
                hang.add(replica)
                inbox.lose()
        self._table.prune(now)
        for replica in hang:
            logger.error("the replica %s has not reported for %.0f s; its requests go on elsewhere", replica, HANG_S)

    async def _follow(self, response: DeploymentResponse, inbox: Inbox, id: str) -> None:
        """Wait for the end of the call. If the events did not end the request by then, end it with an error."""
        try:
            await response
        except (asyncio.CancelledError, TaskCancelledError):
            return  # `generate` has ended, or Ray cancelled the call because the client left
        except Exception as error:  # noqa: BLE001 - any exception of Ray ends the request
            inbox.lost = _is_loss(error)
            inbox.put(self._mapped(error, id))
            return
        if not inbox.closed:
            await asyncio.sleep(_LAST_EVENTS_S)
            inbox.put(InternalError("The model ended this request without an answer."))

    def _mapped(self, error: Exception, id: str) -> ServeAppError:
        """The ServeAppError for an exception of Ray or of the replica."""
        cause = getattr(error, "cause", error)  # Ray wraps the exception of a replica
        if isinstance(cause, ServeAppError):
            return cause
        if isinstance(error, BackPressureError):
            return QueueFull(f"The queue of {self._model} is full. Try again later.", None, 1.0)
        if isinstance(error, DeploymentUnavailableError):
            return NotReady(f"{self._model} is not available: its deployment failed.", retry_after_s=30)
        if _is_loss(error):
            logger.error("the replica with request %s was lost: %s", id, error)
            return replica_lost()
        logger.error("the replica failed on request %s", id, exc_info=error)
        return InternalError("The model failed on this request.")


def _is_loss(error: Exception) -> bool:
    """Whether Ray could not reach the replica, in contrast to an exception that the replica raised."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
