"""OpenAI's endpoint for embeddings, for the models whose configuration has `embeddings: true`."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.completion import CompletionState
from serve_app.api.context import RequestContext, Served, generation_id
from serve_app.api.experiments import user_of
from serve_app.api.generation import collect, run_in_parallel, until_disconnect
from serve_app.api.openai.responses import Embeddings
from serve_app.api.openai.routes import log_user
from serve_app.api.openai.schema import CompletionPrompt, User, to_prompts
from serve_app.api.sampling import MAX_TOKENS, Priority, TruncateTo
from serve_app.api.schema import Body, check_size
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams
from serve_app.errors import InternalError, InvalidRequest, NotFound, ServeAppError


class EmbeddingsBody(Body):
    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    input: CompletionPrompt
    """A text or a list of token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] = "float"
    """A list of numbers, or their little-endian float32 values in base64."""
    dimensions: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """The size of the vectors. Only the model's own size is accepted."""
    user: User | None = None
    """Written to the log with the request's id."""
    truncate_prompt_tokens: TruncateTo | None = None
    """Keep only this number of tokens from the end of each input; -1 keeps as many as the model takes."""
    priority: Priority = 0
    """The waiting request with the lowest value is served first."""


class EmbeddingRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def embeddings(self, http: Request, document: object) -> Response:
        body = EmbeddingsBody.parse(document)
        model = self._context.model_of(http, body.model, user_of(body))
        if not model.model.embeddings:
            raise NotFound(
                f"Model {model.name} offers no embeddings. Set embeddings: true in its configuration to enable them.",
                param="model",
            )
        prompts, call_id = to_prompts(body.input), generation_id(http)
        check_size(prompts, self._context.limits.max_batch_items, "input")
        log_user(call_id, model, body.user)
        requests = [self._request(http, f"{call_id}-{i}", model, prompt, body) for i, prompt in enumerate(prompts)]
        vectors = run_in_parallel(partial(self._embed, request, body.dimensions) for request in requests)
        return JSONResponse(_to_response(model, body, await until_disconnect(http.receive, vectors)))

    def _request(
        self, http: Request, id: str, model: Served, prompt: Prompt, body: EmbeddingsBody
    ) -> GenerationRequest:
        request = self._context.request(http, id, model, prompt, SamplingParams(), stream=False)
        return replace(request, truncate_prompt_tokens=body.truncate_prompt_tokens, priority=body.priority, embed=True)

    async def _embed(
        self, request: GenerationRequest, dimensions: int | None
    ) -> tuple[Sequence[float], CompletionState]:
        """Raises ServeAppError, in which the prompt has the name of this body's field."""
        try:
            state = await collect(self._context.engine, request, self._context.clock)
        except ServeAppError as error:
            if error.param != "prompt":
                raise
            raise type(error)(error.message, "input", error.retry_after_s) from None
        if state.embedding is None:
            raise InternalError(f"Model {request.served_name} returned no embedding.")
        size = len(state.embedding)
        if dimensions not in (None, size):
            raise InvalidRequest(
                f"Field 'dimensions' is {dimensions}, but the vectors of {request.model} have {size} dimensions. Send "
                f"{size} or leave it out.",
                param="dimensions",
            )
        return state.embedding, state


def _to_response(
    model: Served, body: EmbeddingsBody, found: Sequence[tuple[Sequence[float], CompletionState]]
) -> Embeddings:
    tokens = sum(state.prompt_tokens for _, state in found)
    return {
        "object": "list",
        "model": model.served_name,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": list(vector) if body.encoding_format == "float" else _base64(vector),
            }
            for index, (vector, _) in enumerate(found)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
