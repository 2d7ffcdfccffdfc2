"""The HTTP application on one screen: its routes, its layers and its error table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api import pages
from serve_app.api.context import RequestContext
from serve_app.api.error_handlers import ErrorHandlers
from serve_app.api.gateway import Gateway
from serve_app.api.middleware import BodyLimit, CatchAll, Measured, RequestId
from serve_app.api.native.routes import NativeRoutes, OperatorRoutes
from serve_app.api.native.tokens import TokenRoutes
from serve_app.api.openai.embeddings import EmbeddingRoutes
from serve_app.api.openai.routes import OpenAIRoutes
from serve_app.api.tgi.routes import TgiRoutes
from serve_app.config import AppConfig
from serve_app.errors import ServeAppError


def create_app(
    gateway: Gateway,
    config: AppConfig,
    clock: Callable[[], float] = time.monotonic,
    around: Sequence[Middleware] = (),
) -> Starlette:
    """The front context. It reaches models through `gateway` alone; `clock` gives monotonic seconds.

    `around` are layers outside all others.
    """
    refusals = ErrorHandlers(gateway)
    app = Starlette(
        routes=_routes(RequestContext(gateway, config, clock)),
        middleware=[
            *around,
            Middleware(RequestId),
            Middleware(Measured, gateway=gateway),
            Middleware(CatchAll, refusals=refusals),
            Middleware(BodyLimit, limit=config.limits.max_body_bytes, patience_s=config.limits.request_timeout_s),
        ],
        exception_handlers={ServeAppError: refusals.known, HTTPException: refusals.routing},
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body in many clients
    return app


def _routes(context: RequestContext) -> list[Route]:
    tgi = TgiRoutes(context)
    native, operator, openai = NativeRoutes(context, tgi), OperatorRoutes(context), OpenAIRoutes(context)
    tokens, playground, reference = TokenRoutes(context), pages.playground(), pages.reference()
    document = pages.document(tuple(model.name for model in context.config.models))

    async def root(http: Request) -> Response:
        # One route, so that a wrong method is told all the right ones.
        return await (tgi.root if http.method == "POST" else playground.index)(http)

    return [
        Route("/generate", native.generate, methods=["POST"]),
        Route("/generate_stream", native.generate_stream, methods=["POST"]),
        Route("/generate_batch", native.generate_batch, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/embeddings", EmbeddingRoutes(context).embeddings, methods=["POST"]),
        Route("/v1/models", openai.models, methods=["GET"]),
        Route("/v1/models/{id:path}", openai.model, methods=["GET"]),
        Route("/health", operator.health, methods=["GET"]),
        Route("/ready", operator.ready, methods=["GET"]),
        Route("/metrics", operator.metrics, methods=["GET"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/info", tgi.info, methods=["GET"]),
        Route("/openapi.json", document.answer, methods=["GET"]),
        Route("/docs", reference.index, methods=["GET"]),
        Route("/docs/{file}", reference.file, methods=["GET"]),
        Route("/", root, methods=["GET", "POST"]),
        Route("/playground/{file}", playground.file, methods=["GET"]),
    ]
