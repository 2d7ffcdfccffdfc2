"""The HTTP application: its routes, its middleware and its error handlers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from serve_app.api import pages
from serve_app.api.anthropic.routes import AnthropicRoutes
from serve_app.api.auth import Authenticate
from serve_app.api.body import read_document
from serve_app.api.content_coding import DecodeBody
from serve_app.api.context import Audit, RequestContext, configured_adapters, keep, no_audit
from serve_app.api.cors import AllowOrigins
from serve_app.api.error_handlers import ErrorHandlers
from serve_app.api.experiments import ExperimentRoutes, Experiments, NoExperiments, identity_of
from serve_app.api.idempotency import Idempotency
from serve_app.api.middleware import BodyLimits, CacheHeader, CallMetrics, CatchAll, OnePath, RequestId
from serve_app.api.native.routes import NativeRoutes
from serve_app.api.openai.embeddings import EmbeddingRoutes
from serve_app.api.openai.lora import LoraRoutes
from serve_app.api.openai.routes import OpenAIRoutes
from serve_app.api.openai_batches.service import BatchService, disabled
from serve_app.api.openai_responses.routes import ResponsesRoutes
from serve_app.api.operator import OperatorRoutes
from serve_app.api.rate_limits import RateLimitHeaders
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.api.tgi.routes import TgiRoutes, is_tgi
from serve_app.api.tokens.routes import TokenRoutes
from serve_app.api.usage import UsageRoutes
from serve_app.config import AppConfig
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import Engine
from serve_app.core.tenants import Authenticator
from serve_app.core.usage import UsageReports
from serve_app.errors import ServeAppError
from serve_app.jobs.answers import AnswerMemory, AnswerStore

# The fields and separators of an upload, beside its file.
_FIELD_BYTES = 65_536

Endpoint = Callable[[Request], Awaitable[Response]]
DocumentEndpoint = Callable[[Request, object], Awaitable[Response]]


def create_app(
    engine: Engine,
    telemetry: ServiceTelemetry,
    config: AppConfig,
    clock: Callable[[], float] = time.monotonic,
    around: Sequence[Middleware] = (),
    adapters: AdapterDirectory | None = None,
    publish: Callable[[], Awaitable[None]] = keep,
    experiments: Experiments | None = None,
    authenticator: Authenticator | None = None,
    audit: Audit = no_audit,
    usage: UsageReports | None = None,
    batches: BatchService | None = None,
    answers: AnswerStore | None = None,
) -> Starlette:
    """The application over an engine. `clock` returns monotonic seconds; `around` is the outermost middleware.

    The default of `adapters` are those of the configuration; `publish` is awaited after each change of them. Without
    `experiments` every name is that of a model or an adapter. Without `authenticator` everyone may do everything.
    `audit` is awaited for each action of an administrator, before its answer. Without `usage` there are no limits,
    without `batches` no files and batches. `answers` are kept by idempotency keys; the default is in the memory of this
    process.
    """
    handlers = ErrorHandlers(telemetry)
    directory = configured_adapters(config) if adapters is None else adapters
    context = RequestContext(
        engine, telemetry, config, clock, directory, publish, experiments or NoExperiments(), audit=audit
    )
    routes = [*_routes(context, usage), *_batch_routes(batches)]
    app = Starlette(
        routes=routes,
        middleware=[
            *around,
            Middleware(RequestId, clock=clock),
            Middleware(OnePath),
            Middleware(CallMetrics, telemetry=telemetry),
            *([Middleware(AllowOrigins, cors=config.cors)] if config.cors.allow_origins else []),
            *([Middleware(CacheHeader)] if config.response_cache is not None else []),
            *([Middleware(RateLimitHeaders)] if usage is not None else []),
            Middleware(CatchAll, handlers=handlers),
            *(_authenticate(authenticator, routes, handlers, telemetry) if authenticator is not None else []),
            Middleware(BodyLimits, limits=config.limits, max_file_bytes=_max_upload_bytes(batches)),
            Middleware(DecodeBody, limits=config.limits),
            *(
                [
                    Middleware(
                        Idempotency,
                        store=answers or AnswerMemory(config.idempotency, clock, telemetry.answers_kept),
                        handlers=handlers,
                        telemetry=telemetry,
                    )
                ]
                if config.idempotency.max_kept
                else []
            ),
        ],
        exception_handlers={ServeAppError: handlers.known, HTTPException: handlers.routing},
    )
    app.router.redirect_slashes = False  # OnePath has removed a slash at the end
    return app


def _max_upload_bytes(batches: BatchService | None) -> int:
    """The size of the body of an upload: the file, with room for the fields and the lines between the parts."""
    return batches.options.max_file_bytes + _FIELD_BYTES if batches is not None else 0


def _authenticate(
    authenticator: Authenticator, routes: list[Route], handlers: ErrorHandlers, telemetry: ServiceTelemetry
) -> list[Middleware]:
    return [
        Middleware(Authenticate, authenticator=authenticator, routes=routes, handlers=handlers, telemetry=telemetry)
    ]


def _routes(context: RequestContext, usage: UsageReports | None) -> list[Route]:
    native, openai, tgi = NativeRoutes(context), OpenAIRoutes(context), TgiRoutes(context)
    anthropic = AnthropicRoutes(context)
    tokens, embeddings, operator = TokenRoutes(context), EmbeddingRoutes(context), OperatorRoutes(context)
    responses, lora = ResponsesRoutes(context), LoraRoutes(context)
    experiments = ExperimentRoutes(context.experiments)
    playground, reference = pages.playground(), pages.reference()

    async def document(http: Request) -> Response:
        file = await asyncio.to_thread(pages.document, context.served_names(identity_of(http)))
        return await file.answer(http)

    async def docs(http: Request) -> Response:
        if http.scope.get("raw_path", b"").endswith(b"/"):  # the page loads its files from beside its path
            return RedirectResponse("../docs", status_code=308)
        return await reference.index(http)

    async def root(http: Request) -> Response:
        # One route for both methods, so that the answer to a wrong method lists both.
        return await (tgi.root if http.method == "POST" else playground.index)(http)

    return [
        _post("/generate", native.generate, tgi.generate),
        _post("/generate_stream", native.generate_stream, tgi.generate_stream),
        _post("/generate_batch", native.generate_batch),
        _post("/v1/completions", openai.completions),
        _post("/v1/chat/completions", openai.chat),
        _post("/v1/responses", responses.create),
        Route("/v1/responses/{id}", responses.stored, methods=["GET", "DELETE"]),
        Route("/v1/responses/{id}/cancel", responses.cancel, methods=["POST"]),
        _get("/v1/responses/{id}/input_items", responses.input_items),
        _post("/v1/embeddings", embeddings.embeddings),
        _post("/v1/messages", anthropic.messages),
        _post("/v1/messages/count_tokens", anthropic.count_tokens),
        _post("/v1/load_lora_adapter", lora.load),
        _post("/v1/unload_lora_adapter", lora.unload),
        _post("/v1/feedback", experiments.feedback),
        _get("/experiments", experiments.reports),
        _get("/v1/usage", UsageRoutes(usage).usage),
        _get("/v1/models", openai.models),
        _get("/v1/models/{id:path}", openai.model),
        _post("/tokenize", tokens.tokenize, tokens.tokenize_inputs),
        _post("/detokenize", tokens.detokenize),
        _get("/tokenizer_info", tokens.tokenizer_info),
        _get("/info", tgi.info),
        _get("/health", operator.health),
        _get("/ready", operator.ready),
        _get("/metrics", operator.metrics),
        _get("/ping", operator.ready),
        _get("/version", operator.version),
        _get("/load", operator.load),
        _get("/openapi.json", document),
        _get("/docs", docs),
        _get("/docs/{file}", reference.file),
        Route("/", root, methods=["GET", "POST"]),
        _get("/playground/{file}", playground.file),
    ]


def _batch_routes(service: BatchService | None) -> list[Route]:
    """The routes of files and batches. Without batches they answer that the configuration has none."""
    endpoints: tuple[Endpoint, ...] = (disabled,) * 6
    if service is not None:
        # SQLAlchemy takes 0.2 s to import.
        from serve_app.api.openai_batches.batches import BatchRoutes
        from serve_app.api.openai_batches.files import FileRoutes

        files, batches = FileRoutes(service), BatchRoutes(service)
        endpoints = (files.files, files.file, files.content, batches.batches, batches.batch, batches.cancel)
    of_files, of_file, of_content, of_batches, of_batch, of_cancel = endpoints
    return [
        Route("/v1/files", of_files, methods=["GET", "POST"]),
        Route("/v1/files/{id}", of_file, methods=["GET", "DELETE"]),
        _get("/v1/files/{id}/content", of_content),
        Route("/v1/batches", of_batches, methods=["GET", "POST"]),
        _get("/v1/batches/{id}", of_batch),
        Route("/v1/batches/{id}/cancel", of_cancel, methods=["POST"]),
    ]


def _get(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["GET"])


def _post(path: str, endpoint: DocumentEndpoint, of_tgi: DocumentEndpoint | None = None) -> Route:
    """A route that takes a JSON document. On a path of two dialects, a body with `inputs` is TGI's."""

    async def read(http: Request) -> Response:
        document = await read_document(http)
        if of_tgi is not None and is_tgi(document):
            return await of_tgi(http, document)
        return await endpoint(http, document)

    return Route(path, read, methods=["POST"])
