"""What we write is what prometheus-client would."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily

from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.telemetry.exposition import Writer, exposition
from serve_app.telemetry.meter import IngressMetrics
from serve_app.telemetry.metrics import metrics_complete


def test_it_is_what_prometheus_client_writes() -> None:
    registry = CollectorRegistry()
    counter = Counter("hard_to_write", "Labels", ("z", "a"), registry=registry)
    counter.labels('quotes " and \\ slashes', "two\nlines").inc(3)
    gauge = Gauge("values", "Numbers", ("n",), registry=registry)
    for number, value in enumerate((0, -1.5, 1e-9, 2**40, 1e300, math.inf, -math.inf, math.nan)):
        gauge.labels(str(number)).set(value)
    assert exposition([], registry.collect()) == generate_latest(registry)


def test_so_it_does_for_all_of_an_ingress() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=True)
    metrics.http.refused("not_found", "")
    series = metrics._series["m"]
    assert exposition([], series.families()) == generate_latest(series._registry)


def test_a_family_of_several_processes_stands_together() -> None:
    pages = []
    for replica in ("r1", "r2"):
        family = GaugeMetricFamily("slots", "Slots", labels=["replica"])
        family.add_metric([replica], 4)
        pages.append(Writer().snapshot([family]))
    assert exposition([one.gauges for one in pages], [metrics_complete(True)]).decode() == (
        "# HELP slots Slots\n# TYPE slots gauge\n"
        'slots{replica="r1"} 4.0\nslots{replica="r2"} 4.0\n'
        "# HELP serve_app_metrics_complete 1 once every process has had time to report to the ingress that answers; "
        "before that, some are missing\n"
        "# TYPE serve_app_metrics_complete gauge\nserve_app_metrics_complete 1.0\n"
    )


def test_what_is_held_and_what_is_counted_are_apart() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=False)
    families = metrics.families(0.0)
    written = Writer().snapshot(families)
    assert exposition([written.counters, written.gauges]).count(b"# TYPE") == len({family.name for family in families})
    held = exposition([written.gauges]).decode()
    assert "serve_app_active_requests" in held
    assert not any(line.endswith((" counter", " histogram")) for line in held.splitlines())
    assert "gauge" not in exposition([written.counters]).decode()


def test_a_page_is_of_now_although_what_rests_is_not_looked_at_again() -> None:
    metrics, writer = IngressMetrics("r", ["m", "n"], opentelemetry=False), Writer()
    first = metrics.families(0.0)  # kept, so that their numbers are not given twice
    request = GenerationRequest("1", "m", TextPrompt("hello"), SamplingParams(), 0.0, 10.0)

    def shown() -> set[str]:
        written = writer.snapshot(metrics.families(0.0))
        return set(exposition([written.counters, written.gauges]).decode().splitlines())

    resting = shown()
    assert resting == shown()
    meter = metrics.meter(request)
    assert 'serve_app_active_requests{model="m",replica="r"} 1.0' in shown()
    meter.ended()
    changed = shown()
    assert 'serve_app_requests_total{model="m",outcome="cancelled",replica="r"} 1.0' in changed
    assert len(changed ^ resting) == 2
    metrics.woke("n", 3.0)
    assert 'serve_app_model_wake_seconds_sum{model="n",replica="r"} 3.0' in shown()
    now = {id(family) for family in metrics._series["m"].families()}
    assert now.isdisjoint(map(id, first))
