"""Measures the times and tokens of each request at an ingress, and holds all metrics of the ingress."""

from __future__ import annotations

import time
from collections.abc import Collection

from prometheus_client.metrics_core import Metric

from serve_app.core.events import CANCELLED, Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError
from serve_app.telemetry.experiment_metrics import ExperimentSeries
from serve_app.telemetry.job_metrics import JobSeries
from serve_app.telemetry.metrics import (
    FINISHED,
    TPOT_OBJECTIVE_S,
    TTFT_OBJECTIVE_S,
    CacheSeries,
    GenAiSeries,
    HttpSeries,
    QuotaSeries,
    RequestSeries,
)
from serve_app.telemetry.process import ProcessMetrics
from serve_app.telemetry.queue_metrics import QueueSeries


class IngressMetrics:
    """All metrics of one ingress and its process. `opentelemetry` adds request times under OpenTelemetry's names."""

    def __init__(self, replica: str, models: Collection[str], opentelemetry: bool) -> None:
        self.http = HttpSeries(replica, models)
        self.cache = CacheSeries(replica, models)
        self.quotas = QuotaSeries(replica)
        self._series = {model: RequestSeries(model, replica) for model in models}
        self._gen_ai = GenAiSeries(replica) if opentelemetry else None
        self.experiments = ExperimentSeries(replica, models)
        self.jobs = JobSeries(replica)
        self.queues = QueueSeries(replica, models)
        self._process = ProcessMetrics("", replica)

    def families(self, lag_s: float) -> list[Metric]:
        """All metric families. `lag_s` is the delay of the event loop in seconds."""
        families = [*self._process.families(lag_s), *self.http.families(), *self.cache.families()]
        families += [*self.queues.families(), *self.quotas.families(), *self.experiments.families()]
        families += self.jobs.families()
        for series in self._series.values():
            families += series.families()
        return families + (self._gen_ai.families() if self._gen_ai else [])

    def meter(self, request: GenerationRequest) -> Meter | BackgroundMeter:
        series = self._series[request.model]
        return BackgroundMeter(series) if request.background else Meter(request, series, self._gen_ai)

    def woke(self, model: str, seconds: float) -> None:
        """Record how long a model that was scaled to zero took until it was ready."""
        self._series[model].wake.observe(seconds)
        self._series[model].changed = True

    def resumed(self, model: str) -> None:
        """Count an answer that goes on at another replica."""
        self._series[model].resumed.inc()
        self._series[model].changed = True


class Meter:
    """Measures one request from its arrival until it ends, and records its outcome once.

    The times and tokens of a replayed answer are not recorded, because nothing was computed for it; it counts as a
    request with an outcome, and as goodput.
    """

    def __init__(self, request: GenerationRequest, series: RequestSeries, gen_ai: GenAiSeries | None) -> None:
        self._request = request
        self._series = series
        self._gen_ai = gen_ai
        self._sent_at = 0.0
        self._ttft_s: float | None = None
        self._last_s = 0.0
        self._tokens = 0
        self._prompt_tokens = 0
        self._replayed = False
        self._outcome = CANCELLED
        series.active.inc()
        series.changed = True

    def chunk(self, chunk: Chunk) -> None:
        """Record a chunk, just before it is sent."""
        self._replayed = chunk.replayed
        if not chunk.replayed:
            self._measure(chunk)
        if self._tokens == 0:
            self._prompt_tokens = chunk.prompt_tokens
            self._ttft_s = chunk.events[0].elapsed_s if chunk.events else None
        self._tokens += len(chunk.events)
        self._last_s = chunk.events[-1].elapsed_s if chunk.events else 0.0
        self._series.changed = True
        if chunk.finished:
            self._outcome = chunk.outcome

    def failed(self, error: ServeAppError) -> None:
        self._outcome = error.code

    def ended(self) -> None:
        """Record the outcome: the finish reason, an error's code, or CANCELLED."""
        seconds = time.monotonic() - self._request.arrived
        series, complete = self._series, self._outcome in FINISHED
        series.active.dec()
        series.requests[self._outcome].inc()
        if complete:
            self._count_if_good()
        elif self._outcome != CANCELLED and self._tokens:
            series.truncated.inc()
        series.changed = True
        if not self._replayed:
            self._record(seconds, complete)

    @property
    def _tpot_s(self) -> float | None:
        """The mean time per token after the first; None without a second token."""
        if self._ttft_s is None or self._tokens < 2:
            return None
        return (self._last_s - self._ttft_s) / (self._tokens - 1)

    def _measure(self, chunk: Chunk) -> None:
        """Record the times and tokens of a chunk."""
        now, series = time.monotonic(), self._series
        if self._tokens == 0:
            series.queue.observe(chunk.queue_s)
            series.prompt_tokens.inc(chunk.prompt_tokens)
            if chunk.events:
                series.ttft.observe(chunk.events[0].elapsed_s)
                series.prefill.observe(chunk.events[0].elapsed_s - chunk.queue_s)
        elif chunk.events and self._sent_at:
            series.itl.observe(now - self._sent_at)
        self._sent_at = now
        series.tokens.inc(len(chunk.events))

    def _count_if_good(self) -> None:
        met = self._ttft_s is not None and self._ttft_s <= TTFT_OBJECTIVE_S
        if met and (self._tpot_s or 0.0) <= TPOT_OBJECTIVE_S:
            self._series.good.inc()

    def _record(self, seconds: float, complete: bool) -> None:
        """Record a request that was computed, or that failed, in the histograms of whole requests."""
        series, request, tpot_s = self._series, self._request, self._tpot_s if complete else None
        if complete:
            series.duration.observe(seconds)
            series.prompt_length.observe(self._prompt_tokens)
        if complete and self._ttft_s is not None:  # no embedding
            series.response_length.observe(self._tokens)
            series.decode.observe(self._last_s - self._ttft_s)
            if tpot_s is not None:
                series.tpot.observe(tpot_s)
        if self._gen_ai is not None:
            error = "" if complete else self._outcome
            self._gen_ai.ended(request.model, request.operation, error, seconds, self._ttft_s, tpot_s)


class BackgroundMeter:
    """Counts the tokens of a line of a batch.

    Its times and its outcome are no measure of what callers get: a line waits for them, and is tried again.
    """

    def __init__(self, series: RequestSeries) -> None:
        self._series = series
        self._began = False
        series.active.inc()
        series.changed = True

    def chunk(self, chunk: Chunk) -> None:
        if chunk.replayed:
            return
        if not self._began:
            self._began = True
            self._series.prompt_tokens.inc(chunk.prompt_tokens)
        self._series.tokens.inc(len(chunk.events))
        self._series.changed = True

    def failed(self, error: ServeAppError) -> None:
        """The line is tried again, or its answer is the error."""

    def ended(self) -> None:
        self._series.active.dec()
        self._series.changed = True
