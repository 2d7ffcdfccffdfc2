"""The HTTP application on one screen: its routes, its layers and its error table."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from serve_app.api.door import Door
from serve_app.api.embeddings import EmbeddingRoutes
from serve_app.api.gateway import Gateway
from serve_app.api.middleware import BodyLimit, LastResort, RequestId
from serve_app.api.openai import OpenAIRoutes
from serve_app.api.pages import PageRoutes
from serve_app.api.refusal import Refusals
from serve_app.api.routes import NativeRoutes, OperatorRoutes
from serve_app.config import AppConfig
from serve_app.errors import ServeAppError


def create_app(gateway: Gateway, config: AppConfig, clock: Callable[[], float] = time.monotonic) -> Starlette:
    """The front door. It reaches models through `gateway` alone; `clock` gives monotonic seconds."""
    refusals = Refusals(gateway)
    app = Starlette(
        routes=_routes(Door(gateway, config, clock)),
        middleware=[
            Middleware(RequestId),
            Middleware(LastResort, refusals=refusals),
            Middleware(BodyLimit, limit=config.limits.max_body_bytes),
        ],
        exception_handlers={ServeAppError: refusals.known, HTTPException: refusals.routing},
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body in many clients
    return app


def _routes(door: Door) -> list[Route]:
    native, operator, openai = NativeRoutes(door), OperatorRoutes(door), OpenAIRoutes(door)
    pages = PageRoutes()
    return [
        Route("/generate", native.generate, methods=["POST"]),
        Route("/generate_stream", native.generate_stream, methods=["POST"]),
        Route("/generate_batch", native.generate_batch, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/embeddings", EmbeddingRoutes(door).embeddings, methods=["POST"]),
        Route("/v1/models", openai.models, methods=["GET"]),
        Route("/v1/models/{id:path}", openai.model, methods=["GET"]),
        Route("/health", operator.health, methods=["GET"]),
        Route("/ready", operator.ready, methods=["GET"]),
        Route("/metrics", operator.metrics, methods=["GET"]),
        Route("/", pages.index, methods=["GET"]),
        Route("/playground/{file}", pages.file, methods=["GET"]),
    ]
