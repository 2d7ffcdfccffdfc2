"""The metrics of experiments and of feedback, in the registry of one ingress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from serve_app.core.experiments import SKIPPED, YIELDED
from serve_app.telemetry.metrics import OUTCOMES, TPOT_BOUNDS, TTFT_BOUNDS

_VARIANT = ("experiment", "variant", "replica")
_SCORES = ("good", "bad")


class ExperimentSeries:
    """The series of the configured experiments and variants, which exist with the value 0 from `configure` on."""

    def __init__(self, replica: str, models: Iterable[str]) -> None:
        self._replica = replica
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "experiment_requests",
            "Requests of experiments that have ended, by variant and outcome.",
            (*_VARIANT, "outcome"),
        )
        self._shadow = self._counter(
            "experiment_shadow_requests",
            "Requests mirrored to a shadow variant, by outcome. 'skipped' were not started because the model was busy, "
            "'yielded' were ended because a request of a client waited.",
            (*_VARIANT, "outcome"),
        )
        self._tokens = self._counter(
            "experiment_generated_tokens", "Generated tokens of the requests of experiments, by variant.", _VARIANT
        )
        self._ttft = self._histogram(
            "experiment_time_to_first_token_seconds", "TTFT of the requests of experiments, by variant.", TTFT_BOUNDS
        )
        self._tpot = self._histogram(
            "experiment_time_per_output_token_seconds",
            "TPOT of the complete responses of experiments, by variant.",
            TPOT_BOUNDS,
        )
        self._share = self._gauge(
            "experiment_variant_share_ratio", "Share of the units that the variant gets, from 0 to 1.", _VARIANT
        )
        self._stopped = self._gauge(
            "experiment_stopped",
            "1 if a guard has stopped the experiment, so that all requests go to the control; otherwise 0.",
            ("experiment", "replica"),
        )
        self._refused = self._gauge(
            "experiments_config_refused",
            "1 if the latest configuration of experiments cannot be used and the earlier one applies; otherwise 0.",
            ("replica",),
        ).labels(replica)
        self._feedback = self._counter(
            "feedback",
            "Feedback on answers, by the model of the answer or by experiment and variant, and by score: 'good' is 0.5 "
            "or more, 'bad' is less.",
            ("model", *_VARIANT, "score"),
        )
        self._pairs = set[tuple[str, str]]()
        for model in models:
            for score in _SCORES:
                self._feedback.labels(model, "", "", replica, score)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def configure(self, experiments: Mapping[str, Sequence[str]]) -> None:
        """Create the series of each experiment's variants, and remove the gauges of experiments that are gone."""
        self._share.clear()
        self._stopped.clear()
        pairs = {(experiment, variant) for experiment, variants in experiments.items() for variant in variants}
        for pair in self._pairs - pairs:
            self._remove(*pair)
        for pair in pairs - self._pairs:
            self._create(*pair)
        self._pairs = pairs

    def _create(self, experiment: str, variant: str) -> None:
        labels = (experiment, variant, self._replica)
        for outcome in OUTCOMES:
            self._requests.labels(*labels, outcome)
        for outcome in (*OUTCOMES, SKIPPED, YIELDED):
            self._shadow.labels(*labels, outcome)
        for score in _SCORES:
            self._feedback.labels("", *labels, score)
        for family in (self._tokens, self._ttft, self._tpot):
            family.labels(*labels)

    def _remove(self, experiment: str, variant: str) -> None:
        labels = (experiment, variant, self._replica)
        for outcome in OUTCOMES:
            self._requests.remove(*labels, outcome)
        for outcome in (*OUTCOMES, SKIPPED, YIELDED):
            self._shadow.remove(*labels, outcome)
        for score in _SCORES:
            self._feedback.remove("", *labels, score)
        for family in (self._tokens, self._ttft, self._tpot):
            family.remove(*labels)

    def set_state(self, experiment: str, shares: Mapping[str, float], stopped: bool) -> None:
        """Record the current share of each variant, and whether a guard has stopped the experiment."""
        self._stopped.labels(experiment, self._replica).set(stopped)
        for variant, share in shares.items():
            self._share.labels(experiment, variant, self._replica).set(share)

    def set_refused(self, refused: bool) -> None:
        """Record whether the latest configuration was refused."""
        self._refused.set(refused)

    def request_ended(
        self, experiment: str, variant: str, outcome: str, ttft_s: float | None, tpot_s: float | None, tokens: int
    ) -> None:
        if (experiment, variant) not in self._pairs:  # it was removed while the request ran
            return
        labels = (experiment, variant, self._replica)
        self._requests.labels(*labels, outcome).inc()
        self._tokens.labels(*labels).inc(tokens)
        if ttft_s is not None:
            self._ttft.labels(*labels).observe(ttft_s)
        if tpot_s is not None:
            self._tpot.labels(*labels).observe(tpot_s)

    def shadow_ended(self, experiment: str, variant: str, outcome: str) -> None:
        if (experiment, variant) in self._pairs:
            self._shadow.labels(experiment, variant, self._replica, outcome).inc()

    def feedback(self, model: str, experiment: str, variant: str, score: float) -> None:
        if experiment and (experiment, variant) not in self._pairs:
            return
        kind = "good" if score >= 0.5 else "bad"
        self._feedback.labels("" if experiment else model, experiment, variant, self._replica, kind).inc()

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"serve_app_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"serve_app_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"serve_app_{name}", text, _VARIANT, buckets=bounds, registry=self._registry)
