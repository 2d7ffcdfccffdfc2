"""The metrics page has the same text as the page of prometheus-client."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily

from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.telemetry.exposition import Writer, exposition
from serve_app.telemetry.meter import IngressMetrics
from serve_app.telemetry.metrics import metrics_complete


def test_the_text_equals_that_of_prometheus_client() -> None:
    registry = CollectorRegistry()
    counter = Counter("escapes", "Labels", ("z", "a"), registry=registry)
    counter.labels('quotes " and \\ slashes', "two\nlines").inc(3)
    gauge = Gauge("values", "Numbers", ("n",), registry=registry)
    for number, value in enumerate((0, -1.5, 1e-9, 2**40, 1e300, math.inf, -math.inf, math.nan)):
        gauge.labels(str(number)).set(value)
    assert exposition([], registry.collect()) == generate_latest(registry)


def test_the_text_of_an_ingress_equals_that_of_prometheus_client() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=True)
    metrics.http.refused("not_found", "")
    series = metrics._series["m"]
    assert exposition([], series.families()) == generate_latest(series._registry)


def test_the_samples_of_a_family_from_several_processes_stand_together() -> None:
    pages = []
    for replica in ("r1", "r2"):
        family = GaugeMetricFamily("slots", "Slots", labels=["replica"])
        family.add_metric([replica], 4)
        pages.append(Writer().snapshot([family]))
    assert exposition([one.gauges for one in pages], [metrics_complete(True)]).decode() == (
        "# HELP slots Slots\n# TYPE slots gauge\n"
        'slots{replica="r1"} 4.0\nslots{replica="r2"} 4.0\n'
        "# HELP serve_app_metrics_complete 1 if every process has had time to report its metrics to this ingress; "
        "0 if some may be missing.\n"
        "# TYPE serve_app_metrics_complete gauge\nserve_app_metrics_complete 1.0\n"
    )


def test_a_snapshot_has_gauges_apart_from_counters_and_histograms() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=False)
    families = metrics.families(0.0)
    written = Writer().snapshot(families)
    assert exposition([written.counters, written.gauges]).count(b"# TYPE") == len({family.name for family in families})
    gauges = exposition([written.gauges]).decode()
    assert "serve_app_active_requests" in gauges
    assert not any(line.endswith((" counter", " histogram")) for line in gauges.splitlines())
    assert "gauge" not in exposition([written.counters]).decode()


def test_a_page_is_current_although_unchanged_series_are_not_collected_again() -> None:
    metrics, writer = IngressMetrics("r", ["m", "n"], opentelemetry=False), Writer()
    first = metrics.families(0.0)  # the reference keeps the ids of its families unique
    request = GenerationRequest("1", "m", TextPrompt("hello"), SamplingParams(), 0.0, 10.0)

    def page() -> set[str]:
        """The lines of the page without the metrics of the process, which change all the time."""
        written = writer.snapshot(metrics.families(0.0))
        lines = exposition([written.counters, written.gauges]).decode().splitlines()
        return {line for line in lines if not line.startswith("process_")}

    idle = page()
    assert idle == page()
    meter = metrics.meter(request)
    assert 'serve_app_active_requests{model="m",replica="r"} 1.0' in page()
    meter.ended()
    changed = page()
    assert 'serve_app_requests_total{model="m",outcome="cancelled",replica="r"} 1.0' in changed
    assert len(changed ^ idle) == 2
    metrics.woke("n", 3.0)
    assert 'serve_app_model_wake_seconds_sum{model="n",replica="r"} 3.0' in page()
    ids = {id(family) for family in metrics._series["m"].families()}
    assert ids.isdisjoint(map(id, first))
