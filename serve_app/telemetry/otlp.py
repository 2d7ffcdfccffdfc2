"""Exports spans with OpenTelemetry's SDK over OTLP. Imported only if tracing is configured."""

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

# The time to send the remaining spans when a process ends.
_FLUSH_S = 2.0


class Exporter:
    """Sends spans from its own thread. If the collector is too slow, the bounded queue drops its oldest spans.

    OpenTelemetry's variables OTEL_BSP_* set the size of the queue and the export interval. OTEL_RESOURCE_ATTRIBUTES and
    OTEL_SERVICE_NAME set attributes of the resource.
    """

    def __init__(self, settings: Tracing, model: str, replica: str) -> None:
        attributes = {"service.name": "serve_app", "service.version": __version__, "service.instance.id": replica}
        if model:
            attributes["serve_app.model"] = model
        resource = Resource.create(attributes).merge(OTELResourceDetector().detect())
        # The SDK's exit handler would delay the end of the process while the collector is unreachable.
        self._provider = TracerProvider(_Sampler(settings.sampling_ratio), resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.endpoint)))

    @property
    def tracer(self) -> Tracer:
        return self._provider.get_tracer("serve_app", __version__)

    def stop(self) -> None:
        """Send the remaining spans; takes at most 2 s."""
        end = threading.Thread(target=self._provider.shutdown, daemon=True)
        end.start()
        end.join(_FLUSH_S)


class _Sampler(Sampler):
    """Samples by the client's decision, else by the trace id. A span with a link to a sampled span is sampled too."""

    def __init__(self, ratio: float) -> None:
        self._parent_based = ParentBased(TraceIdRatioBased(ratio))

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
        sampler = ALWAYS_ON if linked else self._parent_based
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return "linked, or parent-based by ratio"
