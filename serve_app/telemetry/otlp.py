"""OpenTelemetry's SDK and its OTLP exporter, which only a service that traces needs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, Tracer, TraceState
from opentelemetry.util.types import Attributes

from serve_app import __version__
from serve_app.config import Tracing

# What is left when a process ends is sent if the collector takes it in this time.
_FLUSH_S = 2.0


class Exporter:
    """Sends spans from a thread of its own. Where they cannot be sent, the oldest of a bounded queue are lost.

    The queue and its pace are set by OpenTelemetry's variables, OTEL_BSP_MAX_QUEUE_SIZE and its like; so are
    OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.
    """

    def __init__(self, settings: Tracing, model: str, replica: str) -> None:
        about = {"service.name": "serve_app", "service.version": __version__, "service.instance.id": replica}
        if model:
            about["serve_app.model"] = model
        resource = Resource.create(about).merge(OTELResourceDetector().detect())
        # Without its exit handler, which would hold up the end of a process for a collector that is not there.
        self._provider = TracerProvider(_Sampler(settings.sampling_ratio), resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.endpoint)))

    @property
    def tracer(self) -> Tracer:
        return self._provider.get_tracer("serve_app", __version__)

    def stop(self) -> None:
        """Send what is left, within two seconds."""
        end = threading.Thread(target=self._provider.shutdown, daemon=True)
        end.start()
        end.join(_FLUSH_S)


class _Sampler(Sampler):
    """By the caller's decision, else by the trace id; whatever is linked to a sampled span is sampled too."""

    def __init__(self, ratio: float) -> None:
        self._others = ParentBased(TraceIdRatioBased(ratio))

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        linked = any(link.context.trace_flags.sampled for link in links or ())
        sampler = ALWAYS_ON if linked else self._others
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return "linked, or parent-based by ratio"
