"""Answers the lines of batches by the functions of the endpoints, without HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from serve_app.api.body import parse_document
from serve_app.api.context import RequestContext
from serve_app.api.openai.embeddings import EmbeddingRoutes
from serve_app.api.openai.responses import OPENAI_ERRORS
from serve_app.api.openai.routes import OpenAIRoutes
from serve_app.api.openai_responses.routes import ResponsesRoutes
from serve_app.core.engine import EngineLoad
from serve_app.core.tenants import Identity
from serve_app.errors import ServeAppError, internal_error
from serve_app.jobs.lines import LineAnswer

DocumentEndpoint = Callable[[Request, object], Awaitable[Response]]
# The endpoints that a batch can have.
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class BatchLines:
    """A LineRunner over a context, whose engine gives way to other requests.

    The responses of lines are not stored in the memory of the process: a batch has too many of them.
    """

    def __init__(self, context: RequestContext) -> None:
        config = context.config
        unstored = replace(
            context,
            config=config.model_copy(update={"responses": config.responses.model_copy(update={"max_stored": 0})}),
        )
        openai, embeddings, responses = OpenAIRoutes(context), EmbeddingRoutes(context), ResponsesRoutes(unstored)
        self._context = context
        self._endpoints: dict[str, DocumentEndpoint] = dict(
            zip(ENDPOINTS, (openai.chat, openai.completions, embeddings.embeddings, responses.create), strict=True)
        )

    def parse(self, line: bytes) -> object:
        """Raises InvalidRequest."""
        return parse_document(line)

    def load(self, body: object, identity: Identity) -> tuple[str, EngineLoad] | None:
        """How busy the model of a body is. For an experiment this is the model of its control."""
        name = body.get("model") if isinstance(body, dict) else None
        try:
            model = self._context.model(name if isinstance(name, str) else None, identity).name
        except ServeAppError:
            return None
        return model, self._context.engine.load(model)

    async def answer(self, endpoint: str, body: object, identity: Identity) -> LineAnswer:
        """The answer that the endpoint gives to a body; an error is the answer with its status."""
        http = self._request(endpoint, identity)
        request_id: str = http.state.request_id
        try:
            response = await self._endpoints[endpoint](http, body)
        except ServeAppError as error:
            return _failed(error, request_id)
        except Exception as error:  # noqa: BLE001 (logged, and the answer of this line)
            return _failed(internal_error(error, request_id), request_id)
        return LineAnswer(response.status_code, bytes(response.body).decode(), request_id)

    def _request(self, endpoint: str, identity: Identity) -> Request:
        """What the functions of the endpoints read of a call: its id, its arrival and its caller."""
        state = {"request_id": uuid4().hex, "arrived": self._context.clock(), "identity": identity}
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": endpoint,
            "headers": [],
            "query_string": b"",
            "state": state,
        }
        return Request(scope, _never)


async def _never() -> Message:
    """The client of a line never leaves."""
    await asyncio.Event().wait()
    raise AssertionError("nothing sets the event")


def _failed(error: ServeAppError, request_id: str) -> LineAnswer:
    body = json.dumps(OPENAI_ERRORS.body(error, request_id), ensure_ascii=False)
    return LineAnswer(OPENAI_ERRORS.status(error), body, request_id, error.retry_after_s)
