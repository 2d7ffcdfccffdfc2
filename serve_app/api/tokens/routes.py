"""The endpoints /tokenize and /detokenize, which take no step of the model."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.context import RequestContext
from serve_app.api.generation import until_disconnect
from serve_app.api.tokens.responses import DetokenizedText, TgiTextToken, Tokens
from serve_app.api.tokens.schema import DetokenizeBody, TokenizeBody, TokenizeInputsBody
from serve_app.core.events import TextToken
from serve_app.errors import InvalidRequest


class TokenRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def tokenize(self, http: Request, document: object) -> Response:
        """vLLM's form."""
        body, context = TokenizeBody.parse(document), self._context
        query, model = body.to_query(), context.model_of(http, body.model).name
        tokens = await context.query(http, model, query)
        info = await until_disconnect(http.receive, context.info(model, context.deadline(http)))
        answer: Tokens = {
            "count": len(tokens),
            "max_model_len": info.context,
            "tokens": [token.token_id for token in tokens],
            "token_strs": [token.text for token in tokens] if body.return_token_strs else None,
        }
        return JSONResponse(answer)

    async def tokenize_inputs(self, http: Request, document: object) -> Response:
        """Text Generation Inference's form."""
        body = TokenizeInputsBody.parse(document)
        model = self._context.model_of(http, body.model).name
        tokens = await self._context.query(http, model, body.to_query())
        return JSONResponse([_text_token(token) for token in tokens])

    async def detokenize(self, http: Request, document: object) -> Response:
        body = DetokenizeBody.parse(document)
        query, model = body.to_query(), self._context.model_of(http, body.model).name
        try:
            answer: DetokenizedText = {"prompt": await self._context.query(http, model, query)}
        except InvalidRequest as error:  # the engine names the field `prompt`
            raise InvalidRequest(error.message, param="tokens") from None
        return JSONResponse(answer)


def _text_token(token: TextToken) -> TgiTextToken:
    return {"id": token.token_id, "text": token.text, "start": token.start, "stop": token.end}
