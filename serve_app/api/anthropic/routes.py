"""Anthropic's endpoints for messages and token counts."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.anthropic.encoder import MessagesEncoder, ping
from serve_app.api.anthropic.responses import TokenCounts
from serve_app.api.anthropic.schema import CountTokensBody, MessagesBody
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.experiments import user_of
from serve_app.api.generation import collect, until_disconnect
from serve_app.api.openai.routes import log_user
from serve_app.api.stream import EventStream


class AnthropicRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def messages(self, http: Request, document: object) -> Response:
        body, context, call_id = MessagesBody.parse(document), self._context, generation_id(http)
        model = context.model_of(http, body.model, user_of(body))
        params, choice, prompt = body.params(model.sampling_defaults), body.choice(), body.to_prompt()
        request = replace(
            context.request(http, call_id, model, prompt, params, body.stream),
            tool_choice=choice,
            separate_reasoning=True,
        )
        log_user(call_id, model, body.user)
        encoder = MessagesEncoder(call_id, request, http.state.request_id, body.omits_thinking)
        if body.stream:
            return EventStream(context, [request], encoder, heartbeat=ping)
        state = await until_disconnect(http.receive, collect(context.engine, request, context.clock))
        return JSONResponse(encoder.to_response(state))

    async def count_tokens(self, http: Request, document: object) -> Response:
        body, context = CountTokensBody.parse(document), self._context
        query, served = body.to_query(), context.model_of(http, body.model)
        query = replace(query, prompt=served.prompt(query.prompt))
        counts: TokenCounts = {"input_tokens": len(await context.query(http, served.name, query))}
        return JSONResponse(counts)
