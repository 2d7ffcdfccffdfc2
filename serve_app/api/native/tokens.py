"""Text to tokens and back, without a step of the model: vLLM's endpoints, and TGI's form of the first."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.body import read_document
from serve_app.api.context import RequestContext
from serve_app.api.generation import unless_gone
from serve_app.api.native.tokens_schema import DetokenizeBody, TokenizeBody, TokenizeInputsBody
from serve_app.api.tgi.routes import is_tgi
from serve_app.core.events import TextToken
from serve_app.core.queries import A, Detokenize, Query, Tokenize
from serve_app.core.requests import TextPrompt
from serve_app.errors import InvalidRequest


class TokenRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def tokenize(self, http: Request) -> Response:
        document = await read_document(http)
        if is_tgi(document):
            return await self._inputs(http, TokenizeInputsBody.parse(document))
        body = TokenizeBody.parse(document)
        question, model = body.question(), self._context.asked(http, body.model).name
        pieces = await self._asked(http, model, question)
        info = await unless_gone(http.receive, self._context.info(model))
        return JSONResponse(
            {
                "count": len(pieces),
                "max_model_len": info.context,
                "tokens": [piece.token_id for piece in pieces],
                "token_strs": [piece.text for piece in pieces] if body.return_token_strs else None,
            }
        )

    async def detokenize(self, http: Request) -> Response:
        body = DetokenizeBody.parse(await read_document(http))
        question, model = Detokenize(tuple(body.tokens)), self._context.asked(http, body.model).name
        try:
            return JSONResponse({"prompt": await self._asked(http, model, question)})
        except InvalidRequest as error:  # the model knows them as a prompt
            raise InvalidRequest(error.message, param="tokens") from None

    async def _inputs(self, http: Request, body: TokenizeInputsBody) -> Response:
        pieces = await self._asked(http, self._context.asked(http, body.model).name, Tokenize(TextPrompt(body.inputs)))
        return JSONResponse([_simple_token(piece) for piece in pieces])

    async def _asked(self, http: Request, model: str, question: Query[A]) -> A:
        waits_s = self._context.config.limits.warm_wait_s
        return await unless_gone(http.receive, self._context.gateway.query(model, question, waits_s))


def _simple_token(piece: TextToken) -> dict[str, object]:
    return {"id": piece.token_id, "text": piece.text, "start": piece.start, "stop": piece.end}
