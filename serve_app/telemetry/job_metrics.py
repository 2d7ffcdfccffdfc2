"""The metrics of batch jobs and of idempotency keys, in the registry of one ingress."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import Metric

LINE_OUTCOMES = ("completed", "failed", "retried", "expired", "cancelled")
KEY_OUTCOMES = ("executed", "joined", "replayed", "refused")


class JobSeries:
    """The series of one ingress, which exist with the value 0 from the beginning."""

    def __init__(self, replica: str) -> None:
        self._registry = registry = CollectorRegistry()
        lines = Counter(
            "serve_app_batch_lines",
            "Lines of batches by outcome: 'completed' and 'failed' have an answer, 'expired' and 'cancelled' have "
            "none, 'retried' were put back because the service was busy or failed.",
            ("replica", "outcome"),
            registry=registry,
        )
        self._lines = {outcome: lines.labels(replica, outcome) for outcome in LINE_OUTCOMES}
        self._open = Gauge(
            "serve_app_open_batches",
            "Batches in the database that have not ended; every ingress reports the same number.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._silent = Gauge(
            "serve_app_batch_silent_seconds",
            "Longest time since a batch that has not ended made progress: a result, or another status; 0 without one.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._failures = Counter(
            "serve_app_job_database_errors",
            "Failed calls to the database of batches and of shared idempotency keys.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        keys = Counter(
            "serve_app_idempotent_requests",
            "Requests with an idempotency key: 'executed', 'joined' an equal request that was in progress, "
            "'replayed' an earlier answer, or 'refused' because the key was used for another request.",
            ("replica", "outcome"),
            registry=registry,
        )
        self._keys = {outcome: keys.labels(replica, outcome) for outcome in KEY_OUTCOMES}
        self._kept_bytes = Gauge(
            "serve_app_idempotent_answers_bytes",
            "Memory of the answers that the process keeps by idempotency keys; 0 if the database keeps them.",
            ("replica",),
            registry=registry,
        ).labels(replica)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def line(self, outcome: str, number: int = 1) -> None:
        """Count lines of batches."""
        self._lines[outcome].inc(number)

    def unfinished(self, number: int, silent_s: float) -> None:
        """The number of batches that have not ended, and the longest time since one of them made progress."""
        self._open.set(number)
        self._silent.set(silent_s)

    def failed(self) -> None:
        """Count a failed call to the database."""
        self._failures.inc()

    def key_used(self, outcome: str) -> None:
        """Count a request with an idempotency key."""
        self._keys[outcome].inc()

    def answers_kept(self, size: int) -> None:
        """The kept answers have `size` bytes now."""
        self._kept_bytes.set(size)
