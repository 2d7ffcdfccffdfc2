"""The native endpoints: /generate, /generate_stream and /generate_batch."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.context import RequestContext, generation_id
from serve_app.api.generation import collect, until_disconnect
from serve_app.api.native.batch import Batch
from serve_app.api.native.encoder import NativeEncoder, to_answer
from serve_app.api.native.schema import BatchBody, GenerateBody, StreamBody
from serve_app.api.schema import check_size
from serve_app.api.stream import EventStream
from serve_app.core.requests import GenerationRequest, TextPrompt


class NativeRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def generate(self, http: Request, document: object) -> Response:
        request = self._request(http, GenerateBody.parse(document), stream=False)
        answer = collect(self._context.engine, request, self._context.clock)
        return JSONResponse(to_answer(request, await until_disconnect(http.receive, answer)))

    async def generate_stream(self, http: Request, document: object) -> Response:
        body = StreamBody.parse(document)
        request = self._request(http, body, stream=True)
        return EventStream(self._context, [request], NativeEncoder(request, http.state.request_id, body.include_text))

    async def generate_batch(self, http: Request, document: object) -> Response:
        body = BatchBody.parse(document)
        items = body.items()
        check_size(items, self._context.limits.max_batch_items, body.items_field)
        # The common fields are validated once, for the whole call.
        body.params(self._context.model_of_body(http, body.model).sampling_defaults)
        batch = Batch(self._context, http, items)
        return JSONResponse(await until_disconnect(http.receive, batch.run()))

    def _request(self, http: Request, body: GenerateBody, stream: bool) -> GenerationRequest:
        model = self._context.model_of_body_or_query(http, body.model)
        params, prompt = body.params(model.sampling_defaults), TextPrompt(body.prompt)
        return body.scheduled(self._context.request(http, generation_id(http), model, prompt, params, stream))
