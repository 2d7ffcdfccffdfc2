"""The endpoints /tokenize, /detokenize and /tokenizer_info, which take no step of the model."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.context import RequestContext
from serve_app.api.generation import until_disconnect
from serve_app.api.tokens.responses import AddedTokenFacts, DetokenizedText, TgiTextToken, TokenizerFacts, Tokens
from serve_app.api.tokens.schema import DetokenizeBody, TokenizeBody, TokenizeInputsBody
from serve_app.core.events import TextToken
from serve_app.core.queries import AddedToken, GetTokenizerInfo
from serve_app.errors import InvalidRequest


class TokenRoutes:
    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def tokenize(self, http: Request, document: object) -> Response:
        """vLLM's form."""
        body, context = TokenizeBody.parse(document), self._context
        query, served = body.to_query(), context.model_of(http, body.model)
        model = served.name
        tokens = await context.query(http, model, replace(query, prompt=served.prompt(query.prompt)))
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

    async def tokenizer_info(self, http: Request) -> Response:
        context = self._context
        model = context.model_of_body_or_query(http, None).name
        found = await context.query(http, model, GetTokenizerInfo())
        info = await until_disconnect(http.receive, context.info(model, context.deadline(http)))
        answer: TokenizerFacts = {
            "tokenizer_class": found.kind,
            "bos_token": found.bos_token,
            "eos_token": found.eos_token,
            "pad_token": found.pad_token,
            "unk_token": found.unk_token,
            "model_max_length": info.context,
            "chat_template": found.chat_template,
            "added_tokens_decoder": {str(number): _added_token(token) for number, token in found.added_tokens.items()},
        }
        return JSONResponse(answer)


def _added_token(token: AddedToken) -> AddedTokenFacts:
    return {
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.special,
    }


def _text_token(token: TextToken) -> TgiTextToken:
    return {"id": token.token_id, "text": token.text, "start": token.start, "stop": token.end}
