"""The metrics of the queues have a bounded number of series."""

from __future__ import annotations

from serve_app.telemetry.queue_metrics import MAX_TENANTS, OTHER_TENANTS, QueueSeries


def values(series: QueueSeries, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric, by the values of their labels without the process."""
    return {
        tuple(value for label, value in sample.labels.items() if label != "replica"): sample.value
        for family in series.families()
        for sample in family.samples
        if sample.name == name
    }


def test_tenants_beyond_the_first_are_counted_together() -> None:
    series = QueueSeries("r", ["m", "n"])
    for number in range(MAX_TENANTS + 30):
        series.of_model("m").started(f"t{number}", 0.5)
        series.of_model("n").started(f"t{number}", 0.25)
    counts = values(series, "serve_app_tenant_queue_seconds_count")
    assert len(counts) == 2 * (MAX_TENANTS + 1)
    assert counts["m", "t0"] == 1
    assert counts["m", OTHER_TENANTS] == 30
    assert values(series, "serve_app_tenant_queue_seconds_sum")["n", OTHER_TENANTS] == 7.5


def test_refusals_and_waiting_requests_exist_from_the_start() -> None:
    series, waiting = QueueSeries("r", ["m"]), [0]
    series.watch("m", lambda: waiting[0])
    series.of_model("m").refused("late")
    waiting[0] = 3
    refused = values(series, "serve_app_queue_refusals_total")
    assert refused == {("m", "full"): 0, ("m", "dropped"): 0, ("m", "late"): 1}
    assert values(series, "serve_app_waiting_requests") == {("m",): 3}
