"""Sets up the traces and JSON logs of one process. Packages of disabled features are not imported."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from serve_app.api.app import create_app
from serve_app.api.context import Audit, keep, no_audit
from serve_app.api.experiments import Experiments
from serve_app.api.middleware import OneRequestId
from serve_app.api.openai_batches.service import BatchService
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.config import AppConfig, ConfigError, Telemetry as Settings
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import Engine
from serve_app.core.requests import GenerationRequest
from serve_app.core.tenants import Authenticator
from serve_app.core.usage import UsageReports
from serve_app.engines.protocol import ReplicaEngine
from serve_app.engines.stream import TokenStream
from serve_app.jobs.answers import AnswerStore

if TYPE_CHECKING:
    from serve_app.telemetry.engine_spans import TracedAdmitter
    from serve_app.telemetry.otlp import Exporter


def check(settings: Settings) -> None:
    """Raises ConfigError if tracing is configured and the packages that send spans are not installed."""
    if settings.tracing is None:
        return
    try:
        import serve_app.telemetry.otlp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"telemetry.tracing needs OpenTelemetry's SDK and its OTLP exporter ({error}); "
            "run pip install 'serve_app[tracing]', or set telemetry.tracing to null"
        ) from None


def log_to_serve() -> None:
    """Write the log records of serve_app to the log of the Ray Serve replica.

    Records that cannot be written, for example to a full disk, are lost. Otherwise `logging` would report them on
    sys.stderr, which Ray Serve replaces by the same log: each request would end with a RecursionError.
    """
    logging.raiseExceptions = False
    ours = logging.getLogger("serve_app")
    ours.handlers, ours.propagate = logging.getLogger("ray.serve").handlers, False
    ours.setLevel(logging.INFO)


class ProcessTelemetry:
    """The telemetry of a replica of `model`, or of an ingress if `model` is "". Raises ConfigError: see `check`."""

    def __init__(self, settings: Settings, model: str, replica: str) -> None:
        check(settings)
        self._settings = settings
        self._exporter = _exporter(settings, model, replica)
        if settings.log_format == "json":
            from serve_app.telemetry.logs import write_json

            write_json(model, replica)

    def app(
        self,
        engine: Engine,
        telemetry: ServiceTelemetry,
        config: AppConfig,
        adapters: AdapterDirectory | None = None,
        publish: Callable[[], Awaitable[None]] = keep,
        experiments: Experiments | None = None,
        authenticator: Authenticator | None = None,
        audit: Audit = no_audit,
        usage: UsageReports | None = None,
        batches: BatchService | None = None,
        answers: AnswerStore | None = None,
    ) -> ASGIApp:
        """The HTTP application, with spans and the JSON access log if they are enabled."""
        from starlette.middleware import Middleware

        request_id = Middleware(OneRequestId)
        make = partial(
            create_app,
            config=config,
            adapters=adapters,
            publish=publish,
            experiments=experiments,
            authenticator=authenticator,
            audit=audit,
            usage=usage,
            batches=batches,
            answers=answers,
        )
        if self._exporter is None and self._settings.log_format == "text":
            return make(engine, telemetry, around=[request_id])
        from opentelemetry.trace import NoOpTracer

        from serve_app.telemetry.http_spans import Observe, TracedEngine, TracedTelemetry

        tracer = NoOpTracer() if self._exporter is None else self._exporter.tracer
        capture = self._settings.tracing is not None and self._settings.tracing.capture_content
        spans = Middleware(Observe, tracer=tracer, access_log=self._settings.log_format == "json")
        traced = TracedEngine(engine, tracer, capture)
        return make(traced, TracedTelemetry(telemetry), around=[request_id, spans])

    def admitter(self, engine: ReplicaEngine) -> TracedAdmitter | Admitter:
        """Opens and admits the streams of requests, with spans if tracing is enabled."""
        if self._exporter is None:
            return Admitter(engine)
        from serve_app.telemetry.engine_spans import TracedAdmitter

        return TracedAdmitter(self._exporter.tracer, engine.admit)

    def stop(self) -> None:
        """Send the remaining spans; takes at most 2 s."""
        if self._exporter is not None:
            self._exporter.stop()


class Admitter:
    """Opens and admits the streams of requests without spans."""

    def __init__(self, engine: ReplicaEngine) -> None:
        self.admit = engine.admit

    def open(self, request: GenerationRequest) -> TokenStream:
        """The stream of a request that has just arrived."""
        return TokenStream(request)


def _exporter(settings: Settings, model: str, replica: str) -> Exporter | None:
    if settings.tracing is None:
        return None
    from serve_app.telemetry.otlp import Exporter

    return Exporter(settings.tracing, model, replica)
