"""The OpenAI endpoints: any client that speaks to OpenAI speaks to this service."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.document import read_document
from serve_app.api.door import Door, generation_id
from serve_app.api.generation import collect, unless_gone
from serve_app.api.openai_frames import ChatFrames, CompletionFrames, OpenAIFrames
from serve_app.api.schema_openai import ChatBody, CompletionBody
from serve_app.api.sse import EventStream


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
        request = self._door.request(generation_id(http), model, body.asked(), params, body.cache_salt)
        frames = kind(request, _now(), body.include_usage)
        if body.stream:
            return EventStream(self._door.gateway, request, frames, self._door.config.limits.heartbeat_s)
        tally = await unless_gone(
            http.receive, collect(self._door.gateway, request, self._door.config.limits.warm_wait_s)
        )
        return JSONResponse(frames.whole(tally))

    def _card(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "serve_app"}


def _now() -> int:
    """OpenAI dates its objects by the wall clock."""
    return int(time.time())
