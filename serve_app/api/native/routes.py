"""The native endpoints, and what load balancers and Prometheus ask."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.body import read_document
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.generation import collect, unless_gone
from serve_app.api.native.batch import Batch, check_size
from serve_app.api.native.encoder import NativeEncoder, whole
from serve_app.api.native.schema import BatchBody, GenerateBody, StreamBody
from serve_app.api.sse import EventStream
from serve_app.api.tgi.routes import TgiRoutes, is_tgi
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.requests import GenerationRequest, TextPrompt

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# About one health check's period: asking for readiness more often teaches nothing.
READY_RETRY_S = 5


class NativeRoutes:
    """Two of its paths are TGI's as well: a body with `inputs` is its."""

    def __init__(self, context: RequestContext, tgi: TgiRoutes) -> None:
        self._context = context
        self._tgi = tgi

    async def generate(self, http: Request) -> Response:
        document = await read_document(http)
        if is_tgi(document):
            return await self._tgi.generate(http, document)
        request = self._request(http, GenerateBody.parse(document))
        tally = await unless_gone(
            http.receive, collect(self._context.gateway, request, self._context.config.limits.warm_wait_s)
        )
        return JSONResponse(whole(request, tally))

    async def generate_stream(self, http: Request) -> Response:
        document = await read_document(http)
        if is_tgi(document):
            return await self._tgi.generate_stream(http, document)
        body = StreamBody.parse(document)
        request = self._request(http, body)
        frames = NativeEncoder(request, http.state.request_id, body.include_text)
        return EventStream(self._context.gateway, [request], frames, self._context.config.limits.heartbeat_s)

    async def generate_batch(self, http: Request) -> Response:
        body = BatchBody.parse(await read_document(http))
        items = body.items()
        check_size(
            items, self._context.config.limits.max_batch_items, "requests" if body.prompts is None else "prompts"
        )
        # What the items share is judged once, for the whole call.
        body.params(self._context.model(body.model).sampling_defaults)
        return JSONResponse(await unless_gone(http.receive, Batch(self._context, http, items).run()))

    def _request(self, http: Request, body: GenerateBody) -> GenerationRequest:
        model = self._context.chosen(http, body.model)
        params = body.params(model.sampling_defaults)
        return self._context.request(http, generation_id(http), model, TextPrompt(body.prompt), params, body)


class OperatorRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def health(self, http: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, http: Request) -> Response:
        """Whether any model can answer, or the one of `?model=`: one that fails must not take the others' callers away.

        A model that sleeps by intent is ready: the next request wakes it.
        """
        models = await self._context.gateway.models()
        if "model" in http.query_params:
            name = self._context.model(http.query_params["model"]).name
            models = [model for model in models if model.name == name]
        states = [_status(model) for model in models]
        if any(model.state in (ModelState.READY, ModelState.ASLEEP) for model in models):
            return JSONResponse({"status": "ready", "models": states})
        headers = {"retry-after": str(READY_RETRY_S)}
        return JSONResponse({"status": "not ready", "models": states}, status_code=503, headers=headers)

    async def metrics(self, http: Request) -> Response:
        return Response(await self._context.gateway.metrics(), headers={"content-type": METRICS_TYPE})


def _status(model: ModelStatus) -> dict[str, str]:
    return {"name": model.name, "state": model.state, "detail": model.detail}
