"""What one process tells of single requests: traces and JSON log lines. What is off is not even imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from serve_app.api.app import create_app
from serve_app.api.gateway import Gateway
from serve_app.api.middleware import OneRequestId
from serve_app.config import AppConfig, ConfigError, Telemetry as Settings
from serve_app.core.requests import GenerationRequest
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.stream import TokenStream

if TYPE_CHECKING:
    from serve_app.telemetry.engine_spans import TracedAdmitter
    from serve_app.telemetry.otlp import Exporter


def check(settings: Settings) -> None:
    """Raises ConfigError if spans are asked for and what sends them is not installed."""
    if settings.tracing is None:
        return
    try:
        import serve_app.telemetry.otlp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"telemetry.tracing needs OpenTelemetry's SDK and its OTLP exporter ({error}); "
            "pip install 'serve_app[tracing]', or set it to null"
        ) from None


class Telemetry:
    """Of the replica `replica`, which runs `model` or, if that is "", is an ingress. Raises ConfigError: see check."""

    def __init__(self, settings: Settings, model: str, replica: str) -> None:
        check(settings)
        self._settings = settings
        self._exporter = _exporter(settings, model, replica)
        if settings.log_format == "json":
            from serve_app.telemetry.logs import write_json

            write_json(model, replica)

    def app(self, gateway: Gateway, config: AppConfig) -> ASGIApp:
        """The front door with what watches it."""
        from starlette.middleware import Middleware

        named = Middleware(OneRequestId)
        if self._exporter is None and self._settings.log_format == "text":
            return create_app(gateway, config, around=[named])
        from opentelemetry.trace import NoOpTracer

        from serve_app.telemetry.http_spans import Observe, ObservedGateway

        tracer = NoOpTracer() if self._exporter is None else self._exporter.tracer
        capture = self._settings.tracing is not None and self._settings.tracing.capture_content
        layer = Middleware(Observe, tracer=tracer, access_log=self._settings.log_format == "json")
        return create_app(ObservedGateway(gateway, tracer, capture), config, around=[named, layer])

    def turnstile(self, engine: NativeEngine) -> TracedAdmitter | Admitter:
        """The way into an engine."""
        if self._exporter is None:
            return Admitter(engine)
        from serve_app.telemetry.engine_spans import TracedAdmitter

        return TracedAdmitter(self._exporter.tracer, engine.admit)

    def stop(self) -> None:
        """Send what is left; takes two seconds at most."""
        if self._exporter is not None:
            self._exporter.stop()


class Admitter:
    """The way into an engine when nothing is traced."""

    def __init__(self, engine: NativeEngine) -> None:
        self.admit = engine.admit

    def open(self, request: GenerationRequest) -> TokenStream:
        """A stream for a request that has just come."""
        return TokenStream(request)


def _exporter(settings: Settings, model: str, replica: str) -> Exporter | None:
    if settings.tracing is None:
        return None
    from serve_app.telemetry.otlp import Exporter

    return Exporter(settings.tracing, model, replica)
