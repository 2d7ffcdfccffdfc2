"""Text Generation Inference's endpoints: what huggingface_hub's InferenceClient speaks to."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app import __version__
from serve_app.api.body import read_document
from serve_app.api.choices import forks
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.generation import collect, side_by_side, unless_gone
from serve_app.api.openai.schema import MOST_ANSWERS
from serve_app.api.sse import EventStream
from serve_app.api.tgi.encoder import Json, TgiEncoder, detailed, whole
from serve_app.api.tgi.schema import MOST_STOPS, TgiBody
from serve_app.config import Deployment, Model
from serve_app.core.events import Chunk
from serve_app.core.queries import ModelInfo, ModelState
from serve_app.core.requests import GenerationRequest, TextPrompt
from serve_app.errors import InvalidRequest, ServeAppError


def is_tgi(document: object) -> bool:
    """Whether a body of /generate, /generate_stream or /tokenize is TGI's."""
    return isinstance(document, dict) and "inputs" in document


class TgiRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def root(self, http: Request) -> Response:
        """The body says whether to stream; a whole answer is a list of one."""
        http.state.tgi = True
        body = TgiBody.parse(await read_document(http))
        return self._stream(http, body) if body.stream else JSONResponse([await self._whole(http, body)])

    async def generate(self, http: Request, document: object) -> Response:
        http.state.tgi = True
        body = TgiBody.parse(document)
        if body.stream:
            raise InvalidRequest("stream: true goes to /generate_stream or to /", param="stream")
        return JSONResponse(await self._whole(http, body))

    async def generate_stream(self, http: Request, document: object) -> Response:
        http.state.tgi = True
        body = TgiBody.parse(document)
        if body.stream is False:
            raise InvalidRequest("stream: false goes to /generate or to /", param="stream")
        return self._stream(http, body)

    async def info(self, http: Request) -> Response:
        """Wakes nobody: what only a loaded model knows is null while it sleeps."""
        model = self._context.model(http.query_params.get("model"))
        return JSONResponse(_info(model, await self._known(model.name), self._context.config.limits.max_batch_items))

    async def _whole(self, http: Request, body: TgiBody) -> Json:
        return await unless_gone(http.receive, self._collected(self._requests(http, body, streams=False), body))

    async def _collected(self, requests: Sequence[GenerationRequest], body: TgiBody) -> Json:
        gateway, warm_wait_s = self._context.gateway, self._context.config.limits.warm_wait_s
        tallies = await side_by_side(partial(collect, gateway, request, warm_wait_s) for request in requests)
        if not body.parameters.detailed:
            return whole(tallies, body.prefix)
        special = (await self._context.info(requests[0].model)).special_ids
        return detailed(requests, tallies, body.prefix, special)

    def _stream(self, http: Request, body: TgiBody) -> Response:
        (request,) = self._requests(http, body, streams=True)
        frames = TgiEncoder(request, body.prefix, body.parameters.details)
        return _Stream(self._context, request, frames)

    def _requests(self, http: Request, body: TgiBody, streams: bool) -> list[GenerationRequest]:
        """One for each answer to choose from."""
        # A client of TGI has no field for it, but an address of its own.
        model = self._context.chosen(http, body.model)
        limits, count = self._context.config.limits, body.parameters.best_of
        params = body.params(model.sampling_defaults, streams)
        if count > limits.max_batch_items:
            raise InvalidRequest(
                f"parameters.best_of {count} is over the {limits.max_batch_items} answers of one call; lower it",
                param="parameters.best_of",
            )
        request = GenerationRequest(
            generation_id(http),
            model.name,
            TextPrompt(body.inputs),
            params,
            time.monotonic(),
            self._context.deadline(http),
            truncate_prompt_tokens=body.parameters.truncate,
            prompt_details=body.parameters.decoder_input_details,
        )
        return forks(request, count)

    async def _known(self, model: str) -> ModelInfo | None:
        """What a model said of itself, asked now only if it is there to answer."""
        ready = ModelState.READY in [
            status.state for status in await self._context.gateway.models() if status.name == model
        ]
        with suppress(ServeAppError):
            if ready:
                return await self._context.info(model)
        return self._context.infos.get(model)


class _Stream(EventStream):
    """Asks which tokens are special once the first chunk is there: by then the model is awake."""

    def __init__(self, context: RequestContext, request: GenerationRequest, frames: TgiEncoder) -> None:
        super().__init__(context.gateway, [request], frames, context.config.limits.heartbeat_s)
        self._context = context
        self._model = request.model
        self._tgi = frames

    async def chunks(self, index: int) -> AsyncGenerator[Chunk, None]:
        async with aclosing(super().chunks(index)) as chunks:
            async for chunk in chunks:
                self._tgi.special = (await self._context.info(self._model)).special_ids
                yield chunk


def _info(model: Model, known: ModelInfo | None, most_items: int) -> Json:
    most_open = model.deployment.max_ongoing_requests * _most_replicas(model.deployment)
    return {
        "model_id": model.name,
        "model_sha": model.revision if re.fullmatch(r"[0-9a-f]{40}", model.revision or "") else None,
        "model_dtype": None if model.dtype == "auto" else f"torch.{model.dtype}",
        "model_device_type": _device(model),
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": most_open + model.deployment.max_queued_requests,
        "max_best_of": min(MOST_ANSWERS, most_items),
        "max_stop_sequences": MOST_STOPS,
        "max_input_tokens": None if known is None else known.context - 1,  # an answer has one token at least
        "max_total_tokens": None if known is None else known.context,
        "max_client_batch_size": most_items,
        "router": "serve_app",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _most_replicas(deployment: Deployment) -> int:
    scaled = deployment.autoscaling
    return (deployment.num_replicas or 1) if scaled is None else scaled.max_replicas


def _device(model: Model) -> str:
    """As the loader chooses: the GPU that a replica reserved, else the CPU."""
    if model.device == "auto":
        return "cuda" if model.resources.num_gpus else "cpu"
    return model.device
