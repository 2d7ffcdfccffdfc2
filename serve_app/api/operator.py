"""The endpoints about the service: /health, /ready, /ping, /metrics, /version and /load."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from serve_app import __version__
from serve_app.api.context import RequestContext
from serve_app.api.responses import exact, retry_headers
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.tenants import ANYONE

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# About the period of a load balancer's health check.
READY_RETRY_S = 5


@exact
class Health(TypedDict):
    status: Literal["alive"]


@exact
class ModelReadiness(TypedDict):
    """`detail` is the reason why the model is not ready."""

    name: str
    state: Literal["ready", "loading", "asleep", "failed"]
    detail: str


@exact
class Readiness(TypedDict):
    status: Literal["ready", "not ready"]
    models: list[ModelReadiness]


@exact
class Version(TypedDict):
    version: str


@exact
class Load(TypedDict):
    """The number of requests that run or wait, over all models."""

    server_load: int


class OperatorRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def health(self, http: Request) -> Response:
        alive: Health = {"status": "alive"}
        return JSONResponse(alive)

    async def ready(self, http: Request) -> Response:
        """200 if any model can answer, or the one of `?model=`: a failed model must not take the others out of service.

        A model that is scaled to zero is ready, because the next request wakes it.
        """
        names = [model.name for model in self._context.config.models]
        if "model" in http.query_params:
            names = [self._context.model(http.query_params["model"], ANYONE).name]
        statuses = [self._context.engine.health(name) for name in names]
        ready = any(status.state in (ModelState.READY, ModelState.ASLEEP) for status in statuses)
        body: Readiness = {"status": "ready" if ready else "not ready", "models": [_readiness(one) for one in statuses]}
        if ready:
            return JSONResponse(body)
        return JSONResponse(body, status_code=503, headers=retry_headers(READY_RETRY_S))

    async def version(self, http: Request) -> Response:
        body: Version = {"version": __version__}
        return JSONResponse(body)

    async def load(self, http: Request) -> Response:
        """The requests of this ingress replica, as vLLM counts those of one server."""
        loads = [self._context.engine.load(model.name) for model in self._context.config.models]
        body: Load = {"server_load": sum(load.running + load.waiting for load in loads)}
        return JSONResponse(body)

    async def metrics(self, http: Request) -> Response:
        return Response(await self._context.telemetry.exposition(), headers={"content-type": METRICS_TYPE})


def _readiness(status: ModelStatus) -> ModelReadiness:
    return {"name": status.name, "state": status.state.value, "detail": status.detail}
