"""The OpenAI endpoints: any client that speaks to OpenAI speaks to this service."""

from __future__ import annotations

import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.document import read_document
from serve_app.api.door import Door, generation_id
from serve_app.api.generation import collect, side_by_side, unless_gone
from serve_app.api.openai_frames import ChatFrames, CompletionFrames, OpenAIFrames
from serve_app.api.schema_openai import ChatBody, CompletionBody
from serve_app.api.sse import EventStream
from serve_app.types import GenerationRequest


class OpenAIRoutes:
    def __init__(self, door: Door) -> None:
        self._door = door
        self._began = _now()

    async def completions(self, http: Request) -> Response:
        return await self._answer(http, CompletionBody.parse(await read_document(http)), CompletionFrames)

    async def chat(self, http: Request) -> Response:
        return await self._answer(http, ChatBody.parse(await read_document(http)), ChatFrames)

    async def models(self, http: Request) -> Response:
        names = [model.name for model in self._door.config.models]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, http: Request) -> Response:
        return JSONResponse(self._card(self._door.model(http.path_params["id"]).name))

    async def _answer(self, http: Request, body: CompletionBody | ChatBody, kind: type[OpenAIFrames]) -> Response:
        model = self._door.model(body.model)
        http.state.model = model.name
        params = body.params(model.sampling_defaults)
        request = self._door.request(generation_id(http), model, body.asked(), params, body)
        requests = [request] if body.n == 1 else [_fork(request, index) for index in range(body.n)]
        frames = kind(request, _now(), body.include_usage, body.n)
        gateway, limits = self._door.gateway, self._door.config.limits
        if body.stream:
            return EventStream(gateway, requests, frames, limits.heartbeat_s)
        answers = side_by_side(collect(gateway, fork, limits.warm_wait_s) for fork in requests)
        return JSONResponse(frames.whole(await unless_gone(http.receive, answers)))

    def _card(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "serve_app"}


def _fork(request: GenerationRequest, index: int) -> GenerationRequest:
    """One of several answers, whose prompt is computed once."""
    return replace(request, id=f"{request.id}-{index}", group=request.id, index=index)


def _now() -> int:
    """OpenAI dates its objects by the wall clock."""
    return int(time.time())
