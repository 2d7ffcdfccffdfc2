"""OpenAI's endpoints for completions, chat completions and models."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.choices import best_of_each, fork, with_logprobs
from serve_app.api.context import RequestContext, Served, generation_id
from serve_app.api.experiments import identity_of, user_of
from serve_app.api.generation import collect, run_in_parallel, until_disconnect
from serve_app.api.openai.chat_encoder import ChatEncoder
from serve_app.api.openai.completion_encoder import CompletionEncoder
from serve_app.api.openai.encoder import OpenAIEncoder
from serve_app.api.openai.responses import ModelCard, ModelList
from serve_app.api.openai.schema import ChatBody, CompletionBody
from serve_app.api.stream import EventStream
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InvalidRequest

log = logging.getLogger(__name__)


class OpenAIRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._created = _now()

    async def completions(self, http: Request, document: object) -> Response:
        return await self._answer(http, CompletionBody.parse(document), CompletionEncoder)

    async def chat(self, http: Request, document: object) -> Response:
        return await self._answer(http, ChatBody.parse(document), ChatEncoder)

    async def models(self, http: Request) -> Response:
        context = self._context
        identity = identity_of(http)
        cards = [self._card(context.model(name, identity)) for name in context.served_names(identity)]
        body: ModelList = {"object": "list", "data": cards}
        return JSONResponse(body)

    async def model(self, http: Request) -> Response:
        return JSONResponse(self._card(self._context.model(http.path_params["id"], identity_of(http))))

    async def _answer(self, http: Request, body: CompletionBody | ChatBody, encoding: type[OpenAIEncoder]) -> Response:
        context, call_id = self._context, generation_id(http)
        model = context.model_of(http, body.model, user_of(body))
        requests = self._requests(http, call_id, model, body)
        log_user(call_id, model, body.user)
        encoder = encoding(call_id, requests, _now(), body.show)
        if body.stream:
            return EventStream(context, requests, encoder)
        choose = body.sampled > body.n
        answers = run_in_parallel(
            partial(collect, context.engine, with_logprobs(request) if choose else request, context.clock)
            for request in requests
        )
        states = await until_disconnect(http.receive, answers)
        shown = best_of_each(states, body.sampled, body.n) if choose else range(len(states))
        return JSONResponse(encoder.to_response(states, shown))

    def _requests(
        self, http: Request, call_id: str, model: Served, body: CompletionBody | ChatBody
    ) -> list[GenerationRequest]:
        """One request for each answer, in the order of the choices. Raises InvalidRequest."""
        params, choice, prompts = body.params(model.sampling_defaults), body.choice(), body.to_prompts()
        count, limit = len(prompts) * body.sampled, self._context.limits.max_batch_items
        if count > limit:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {body.sampled} answers each are {count} answers. Ask for at most {limit} "
                "answers in one call.",
                param="prompt",
            )
        ids = [call_id] if len(prompts) == 1 else [f"{call_id}-{number}" for number in range(len(prompts))]
        requests = [
            replace(
                body.scheduled(self._context.request(http, each, model, prompt, params, body.stream)),
                prompt_details=body.show.echo or body.show.token_ids,
                tool_choice=choice,
                separate_reasoning=isinstance(body, ChatBody),
            )
            for each, prompt in zip(ids, prompts, strict=True)
        ]
        return [one for request in requests for one in fork(request, body.sampled, body.stream)]

    def _card(self, served: Served) -> ModelCard:
        adapter = served.adapter
        return {
            "id": served.served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "serve_app",
            "root": served.name if adapter is None else adapter.source,
            "parent": None if adapter is None else served.name,
        }


def log_user(call_id: str, model: Served, user: str | None) -> None:
    if user is not None:
        log.info("Request %s to %s is for user %r.", call_id, model.served_name, user)


def _now() -> int:
    """OpenAI's objects have the wall clock in whole seconds."""
    return int(time.time())
