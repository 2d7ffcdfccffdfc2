"""The exporter sends spans to a collector over HTTP, and never delays the service."""

from __future__ import annotations

import socket
import time

import pytest

from serve_app.config import Tracing
from serve_app.telemetry.otlp import Exporter
from tests.collector import Collector


@pytest.mark.slow
def test_stop_sends_the_remaining_spans() -> None:
    with Collector() as collector:
        exporter = Exporter(Tracing(endpoint=collector.endpoint, sampling_ratio=1), "small", "abc")
        exporter.tracer.start_span("last").end()
        exporter.stop()
        (span,) = collector.spans()
        assert span.name == "last"
        assert (span.resource["service.instance.id"], span.resource["serve_app.model"]) == ("abc", "small")


@pytest.mark.slow
def test_stop_does_not_wait_for_a_collector_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = Exporter(Tracing(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", sampling_ratio=1), "", "r")
        exporter.tracer.start_span("lost").end()
        began = time.monotonic()
        exporter.stop()
        assert time.monotonic() - began < 4


@pytest.mark.slow
def test_a_trace_that_is_not_sampled_is_not_recorded() -> None:
    with Collector() as collector:
        exporter = Exporter(Tracing(endpoint=collector.endpoint, sampling_ratio=0), "", "r")
        span = exporter.tracer.start_span("no")
        assert not span.is_recording()
        span.end()
        exporter.stop()
        assert collector.exports == 0
