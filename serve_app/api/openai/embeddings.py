"""OpenAI's embeddings: texts to vectors, for the models that are switched on for it."""

from __future__ import annotations

import struct
import time
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.body import read_document
from serve_app.api.completion import CompletionState
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.generation import collect, side_by_side, unless_gone
from serve_app.api.native.batch import check_size
from serve_app.api.native.schema import MOST_TOKENS, KeptTokens, Priority
from serve_app.api.openai.routes import log_user
from serve_app.api.openai.schema import CompletionPrompt, User, prompts
from serve_app.api.schema import Body
from serve_app.config import Model
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams
from serve_app.errors import InternalError, InvalidRequest, NotFound, ServeAppError


class EmbeddingsBody(Body):
    """`dimensions` is taken where it is what the model has anyway."""

    model: str | None = None
    """Left out, the first of the configuration."""
    input: CompletionPrompt
    """A text or token ids, or several of either."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or their little-endian float32 in base64."""
    dimensions: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    """Only what the model has anyway."""
    user: User | None = None
    """Written to the log with the request's id."""
    truncate_prompt_tokens: KeptTokens | None = None
    """Only so many of the last tokens are kept; -1 for as many as the model takes."""
    priority: Priority = 0
    """Of requests that wait, the lowest is served first."""


class EmbeddingRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def embeddings(self, http: Request) -> Response:
        body = EmbeddingsBody.parse(await read_document(http))
        model = self._context.asked(http, body.model)
        if not model.embeddings:
            raise NotFound(
                f"{model.name} gives no embeddings; its operator switches them on with embeddings: true in the "
                "model's configuration",
                param="model",
            )
        asked = prompts(body.input)
        check_size(asked, self._context.config.limits.max_batch_items, "input")
        name = generation_id(http)
        log_user(name, model, body.user)
        requests = [self._request(http, f"{name}-{i}", model, prompt, body) for i, prompt in enumerate(asked)]
        vectors = side_by_side(partial(self._vector, request, body.dimensions) for request in requests)
        return JSONResponse(_whole(model, body, await unless_gone(http.receive, vectors)))

    def _request(self, http: Request, id: str, model: Model, prompt: Prompt, body: EmbeddingsBody) -> GenerationRequest:
        return GenerationRequest(
            id,
            model.name,
            prompt,
            SamplingParams(),
            time.monotonic(),
            self._context.deadline(http),
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            priority=body.priority,
            embed=True,
        )

    async def _vector(
        self, request: GenerationRequest, dimensions: int | None
    ) -> tuple[Sequence[float], CompletionState]:
        """Raises ServeAppError, which calls the prompt what it is called here."""
        try:
            tally = await collect(self._context.gateway, request, self._context.config.limits.warm_wait_s)
        except ServeAppError as error:
            if error.param != "prompt":
                raise
            raise type(error)(error.message, "input", error.retry_after_s) from None
        if tally.embedding is None:
            raise InternalError("the model gave no embedding")
        size = len(tally.embedding)
        if dimensions not in (None, size):
            raise InvalidRequest(
                f"dimensions is {dimensions}, but the vectors of {request.model} have {size}; send {size} or leave it "
                "out",
                param="dimensions",
            )
        return tally.embedding, tally


def _whole(
    model: Model, body: EmbeddingsBody, found: Sequence[tuple[Sequence[float], CompletionState]]
) -> dict[str, object]:
    tokens = sum(tally.prompt_tokens for _, tally in found)
    return {
        "object": "list",
        "model": model.name,
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
    """Little-endian float32, as OpenAI's clients read it."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
