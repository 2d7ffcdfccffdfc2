"""OpenAI's endpoints for responses: they create, continue, read, list and delete responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.context import RequestContext, Served, generation_id
from serve_app.api.experiments import identity_of, user_of
from serve_app.api.generation import collect, until_disconnect
from serve_app.api.openai.routes import log_user
from serve_app.api.openai_responses.conversation import Item
from serve_app.api.openai_responses.encoder import ResponseEncoder
from serve_app.api.openai_responses.items import to_items
from serve_app.api.openai_responses.objects import DeletedResponse, ResponseObject
from serve_app.api.openai_responses.open_items import new_id
from serve_app.api.openai_responses.page import page_of
from serve_app.api.openai_responses.schema import ResponsesBody
from serve_app.api.openai_responses.store import ResponseStore, StoredResponse
from serve_app.api.openai_responses.truncation import room_for_answer, shorten
from serve_app.api.stream import EventStream
from serve_app.core.queries import Tokenize
from serve_app.core.requests import ChatPrompt, GenerationRequest
from serve_app.errors import InvalidRequest, NotFound, PreviousResponseNotFound


class ResponsesRoutes:
    """The endpoints, which share one store of responses."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._store = ResponseStore(context.config.responses, context.clock, context.telemetry.responses_stored)

    async def create(self, http: Request, document: object) -> Response:
        body = ResponsesBody.parse(document)
        context = self._context
        model = context.model_of(http, body.model, user_of(body))
        tenant = identity_of(http).tenant
        earlier = self._conversation(body.previous_response_id, tenant)
        given = tuple(body.items(earlier, partial(self._store.item, tenant=tenant)))
        request = await self._request(http, model, body, [*earlier, *given])
        stored = body.store and self._store.enabled
        keep = partial(self._keep, tenant, earlier, given) if stored else _forget
        encoder = ResponseEncoder(new_id("resp"), request, body.echo(request.params, stored), keep)
        if body.stream:
            return EventStream(context, [request], encoder)
        state = await until_disconnect(http.receive, collect(context.engine, request, context.clock))
        return JSONResponse(encoder.to_response(state))

    async def stored(self, http: Request) -> Response:
        """Read or delete a stored response."""
        if http.method == "DELETE":
            return self._delete(http)
        if http.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise InvalidRequest("A stored response cannot be streamed. Leave 'stream' out.", param="stream")
        return Response(self._find(http).body, media_type="application/json")

    async def cancel(self, http: Request) -> Response:
        self._find(http)
        raise InvalidRequest(
            # OpenAI's words, by which clients recognize this error.
            "Cannot cancel a synchronous response. Close the connection of its request instead."
        )

    async def input_items(self, http: Request) -> Response:
        return JSONResponse(page_of(self._find(http).read, http.query_params))

    async def _request(
        self, http: Request, model: Served, body: ResponsesBody, items: Sequence[Item]
    ) -> GenerationRequest:
        """The request to the model. Raises InvalidRequest if fields contradict each other."""
        context, call_id = self._context, generation_id(http)
        params, choice = body.params(model.sampling_defaults), body.choice()
        log_user(call_id, model, body.user)
        prompt = body.to_prompt(items)
        if body.truncation == "auto":
            prompt = await self._shortened(http, model, body, items)
        return replace(
            body.scheduled(context.request(http, call_id, model, prompt, params, body.stream)),
            tool_choice=choice,
            separate_reasoning=True,
        )

    async def _shortened(self, http: Request, model: Served, body: ResponsesBody, items: Sequence[Item]) -> ChatPrompt:
        """The prompt without the oldest turns, if the conversation is too long for the model."""
        context = self._context
        info = await until_disconnect(http.receive, context.info(model.name, context.deadline(http)))

        async def tokens(shorter: Sequence[Item]) -> int:
            return len(await context.query(http, model.name, Tokenize(model.prompt(body.to_prompt(shorter)))))

        limit = info.context - room_for_answer(info.context, body.max_output_tokens)
        return body.to_prompt(await shorten(items, limit, tokens))

    def _conversation(self, response_id: str | None, tenant: str) -> tuple[Item, ...]:
        """The conversation of a stored response; empty for None. Raises PreviousResponseNotFound."""
        if response_id is None:
            return ()
        found = self._store.get(response_id, tenant)
        if found is None:
            raise PreviousResponseNotFound(
                f"Previous response with id '{response_id[:128]}' not found. Responses expire, and each process of the "
                "service has its own. Send the whole conversation as 'input'.",
                param="previous_response_id",
            )
        return found.conversation

    def _find(self, http: Request) -> StoredResponse:
        """The stored response of the caller's tenant that the path names. Raises NotFound."""
        response_id = http.path_params["id"]
        found = self._store.get(response_id, identity_of(http).tenant)
        if found is None:
            raise _not_found(response_id)
        return found

    def _delete(self, http: Request) -> Response:
        """Raises NotFound."""
        response_id = http.path_params["id"]
        if not self._store.delete(response_id, identity_of(http).tenant):
            raise _not_found(response_id)
        body: DeletedResponse = {"id": response_id, "object": "response", "deleted": True}
        return JSONResponse(body)

    def _keep(self, tenant: str, earlier: tuple[Item, ...], given: tuple[Item, ...], response: ResponseObject) -> None:
        body = json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
        self._store.put(StoredResponse(response["id"], body, earlier, given, to_items(response["output"]), tenant))


def _forget(response: ResponseObject) -> None:
    """For a response that is not stored."""


def _not_found(response_id: str) -> NotFound:
    return NotFound(
        f"Response with id '{response_id[:128]}' not found. Responses expire, and each process of the service has its "
        "own."
    )
