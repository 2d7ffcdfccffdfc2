"""The OpenAI endpoints: any client that speaks to OpenAI speaks to this service."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.body import read_document
from serve_app.api.choices import best_of_each, forks, kept, measured
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.generation import collect, side_by_side, unless_gone
from serve_app.api.openai.encoder import ChatEncoder, CompletionEncoder, OpenAIEncoder
from serve_app.api.openai.schema import ChatBody, CompletionBody, Show
from serve_app.api.openai.tool_encoder import ToolEncoder
from serve_app.api.sse import EventStream
from serve_app.config import Model
from serve_app.core.requests import GenerationRequest, SamplingParams
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.errors import InvalidRequest

log = logging.getLogger(__name__)


class OpenAIRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._began = _now()

    async def completions(self, http: Request) -> Response:
        body = CompletionBody.parse(await read_document(http))
        model = self._context.asked(http, body.model)
        return await self._answer(http, model, body, body.params(model.sampling_defaults), CompletionEncoder)

    async def chat(self, http: Request) -> Response:
        body = ChatBody.parse(await read_document(http))
        model = self._context.asked(http, body.model)
        params = body.params(model.sampling_defaults)
        if not body.may_call:
            return await self._answer(http, model, body, params, ChatEncoder)
        syntax = await self._tool_syntax(model)
        return await self._answer(
            http, model, body, body.constrained(params, syntax), partial(ToolEncoder, syntax=syntax)
        )

    async def models(self, http: Request) -> Response:
        names = [model.name for model in self._context.config.models]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, http: Request) -> Response:
        return JSONResponse(self._card(self._context.model(http.path_params["id"]).name))

    async def _answer(
        self,
        http: Request,
        model: Model,
        body: CompletionBody | ChatBody,
        params: SamplingParams,
        kind: Callable[[str, list[GenerationRequest], int, bool, Show], OpenAIEncoder],
    ) -> Response:
        name, limits = generation_id(http), self._context.config.limits
        requests = self._requests(http, name, model, body, params)
        log_user(name, model, body.user)
        frames = kind(name, requests, _now(), body.include_usage, body.show)
        if body.stream:
            return EventStream(self._context.gateway, requests, frames, limits.heartbeat_s)
        chooses = body.drawn > body.n
        answers = side_by_side(
            partial(collect, self._context.gateway, measured(request) if chooses else request, limits.warm_wait_s)
            for request in requests
        )
        tallies = await unless_gone(http.receive, answers)
        whole = frames.whole(tallies)
        return JSONResponse(kept(whole, best_of_each(tallies, body.drawn, body.n)) if chooses else whole)

    def _requests(
        self, http: Request, name: str, model: Model, body: CompletionBody | ChatBody, params: SamplingParams
    ) -> list[GenerationRequest]:
        """One for each answer, in the order of the choices. Raises InvalidRequest when there are too many."""
        prompts, most = body.asked(), self._context.config.limits.max_batch_items
        if len(prompts) * body.drawn > most:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {body.drawn} answers each are {len(prompts) * body.drawn} answers; "
                f"ask for at most {most} in one call",
                param="prompt",
            )
        names = [name] if len(prompts) == 1 else [f"{name}-{number}" for number in range(len(prompts))]
        requests = [
            self._context.request(http, each, model, prompt, params, body)
            for each, prompt in zip(names, prompts, strict=True)
        ]
        requests = [replace(each, prompt_details=body.show.echo or body.show.token_ids) for each in requests]
        return [fork for request in requests for fork in forks(request, body.drawn, body.stream)]

    async def _tool_syntax(self, model: Model) -> ToolCallFormat:
        """Raises InvalidRequest if the model cannot call tools."""
        syntax = (await self._context.info(model.name)).tools
        if syntax is None:
            raise InvalidRequest(
                f"{model.name} calls no tools: its chat template takes none, or writes calls in a way that is not "
                "understood here; leave tools out, or let its configuration give it one that does, for example "
                "chat_template: builtin:chatml_tools",
                param="tools",
            )
        return syntax

    def _card(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "serve_app"}


def log_user(name: str, model: Model, user: str | None) -> None:
    if user is not None:
        log.info("request %s to %s is for user %r", name, model.name, user)


def _now() -> int:
    """OpenAI dates its objects by the wall clock."""
    return int(time.time())
