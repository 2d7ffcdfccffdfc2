"""Text Generation Inference's endpoints, for huggingface_hub's InferenceClient and similar clients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app import __version__
from serve_app.api.body import read_document
from serve_app.api.choices import fork
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.experiments import identity_of
from serve_app.api.generation import collect, run_in_parallel, until_disconnect
from serve_app.api.sampling import MAX_ANSWERS
from serve_app.api.stream import EventStream
from serve_app.api.tgi.encoder import TgiEncoder, to_details, to_text
from serve_app.api.tgi.responses import TgiAnswer, TgiInfo
from serve_app.api.tgi.schema import MAX_STOP_SEQUENCES, TgiBody
from serve_app.config import Deployment, Model
from serve_app.core.queries import ModelInfo, ModelState
from serve_app.core.requests import GenerationRequest, TextPrompt
from serve_app.errors import InvalidRequest, ServeAppError


def is_tgi(document: object) -> bool:
    """Whether a body is TGI's, on a path that belongs to two dialects."""
    return isinstance(document, dict) and "inputs" in document


class TgiRoutes:
    """Every route sets `tgi` in the state of the request, so that errors have TGI's form."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def root(self, http: Request) -> Response:
        """The body decides whether to stream. A whole answer is a list with one item."""
        http.state.tgi = True
        body = TgiBody.parse(await read_document(http))
        return self._stream(http, body) if body.stream else JSONResponse([await self._answer(http, body)])

    async def generate(self, http: Request, document: object) -> Response:
        http.state.tgi = True
        body = TgiBody.parse(document)
        if body.stream:
            raise InvalidRequest("Send stream: true to /generate_stream or to /.", param="stream")
        return JSONResponse(await self._answer(http, body))

    async def generate_stream(self, http: Request, document: object) -> Response:
        http.state.tgi = True
        body = TgiBody.parse(document)
        if body.stream is False:
            raise InvalidRequest("Send stream: false to /generate or to /.", param="stream")
        return self._stream(http, body)

    async def info(self, http: Request) -> Response:
        """Wakes no model: the values that only a loaded model knows are null until it was loaded once."""
        model = self._context.model(http.query_params.get("model"), identity_of(http))
        known = await self._known(http, model.name)
        info = _info(model.model, known, self._context.limits.max_batch_items)
        return JSONResponse({**info, "model_id": model.served_name})

    async def _answer(self, http: Request, body: TgiBody) -> TgiAnswer:
        requests = self._requests(http, body, stream=False)
        return await until_disconnect(http.receive, self._collect(requests, body))

    async def _collect(self, requests: Sequence[GenerationRequest], body: TgiBody) -> TgiAnswer:
        context = self._context
        states = await run_in_parallel(partial(collect, context.engine, request, context.clock) for request in requests)
        if not body.parameters.wants_details:
            return to_text(states, body.prefix)
        info = await context.info(requests[0].model, requests[0].deadline)
        return to_details(requests, states, body.prefix, info.special_ids)

    def _stream(self, http: Request, body: TgiBody) -> Response:
        (request,) = self._requests(http, body, stream=True)
        encoder = TgiEncoder(request, body.prefix, body.parameters.details)

        async def prepare() -> None:
            """Runs when the first chunk is there, because the model is awake then."""
            encoder.special_ids = (await self._context.info(request.model, request.deadline)).special_ids

        return EventStream(self._context, [request], encoder, prepare)

    def _requests(self, http: Request, body: TgiBody, stream: bool) -> list[GenerationRequest]:
        """One request for each answer to choose from."""
        model = self._context.model_of_body_or_query(http, body.model)
        limit, count = self._context.limits.max_batch_items, body.parameters.best_of
        params = body.params(model.sampling_defaults, stream)
        if count > limit:
            raise InvalidRequest(
                f"Field 'parameters.best_of' is {count}, above the limit of {limit} answers in one call. Lower it.",
                param="parameters.best_of",
            )
        request = self._context.request(http, generation_id(http), model, TextPrompt(body.inputs), params, stream)
        request = replace(
            request,
            truncate_prompt_tokens=body.parameters.truncate,
            prompt_details=body.parameters.decoder_input_details,
        )
        return fork(request, count)

    async def _known(self, http: Request, model: str) -> ModelInfo | None:
        """The facts of a model: queried only if the model is ready, else those of an earlier query."""
        context = self._context
        with suppress(ServeAppError):
            if context.engine.health(model).state is ModelState.READY:
                return await context.info(model, context.deadline(http))
        return context.known.get(model)


def _info(model: Model, known: ModelInfo | None, max_items: int) -> TgiInfo:
    max_running = model.deployment.max_ongoing_requests * _max_replicas(model.deployment)
    return {
        "model_id": model.name,
        "model_sha": model.revision if re.fullmatch(r"[0-9a-f]{40}", model.revision or "") else None,
        "model_dtype": _dtype(model, known),
        "model_device_type": _device(model),
        "quantization": _quantization(model, known),
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": max_running + model.deployment.max_queued_requests,
        "max_best_of": min(MAX_ANSWERS, max_items),
        "max_stop_sequences": MAX_STOP_SEQUENCES,
        "max_input_tokens": None if known is None else known.context - 1,  # an answer has at least one token
        "max_total_tokens": None if known is None else known.context,
        "max_client_batch_size": max_items,
        "router": "serve_app",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _dtype(model: Model, known: ModelInfo | None) -> str | None:
    """What the model computes in; None while `auto` has not been decided."""
    dtype = (known and known.dtype) or ("" if model.dtype == "auto" else model.dtype)
    return f"torch.{dtype}" if dtype else None


def _quantization(model: Model, known: ModelInfo | None) -> str | None:
    """The quantization of the weights; None while `auto` has not been decided."""
    configured = None if model.quantization == "auto" else model.quantization
    return (known and known.quantization) or configured


def _max_replicas(deployment: Deployment) -> int:
    autoscaling = deployment.autoscaling
    return (deployment.num_replicas or 1) if autoscaling is None else autoscaling.max_replicas


def _device(model: Model) -> str:
    """The loader's choice for `auto`: the GPU that a replica reserves, else the CPU."""
    if model.device == "auto":
        return "cuda" if model.resources.num_gpus else "cpu"
    return model.device
