"""What an ingress measures, and the metrics page of the whole service."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from serve_app.config import AppConfig
from serve_app.core.http import HttpCall
from serve_app.core.queries import ModelStatus
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError
from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.meter import IngressMetrics, Meter
from serve_app.telemetry.metrics import ages, hub_up, states

if TYPE_CHECKING:
    from serve_app.deployments.hub import HeartbeatSender

logger = logging.getLogger("ray.serve")

_EXCHANGE_S = 2.0


class IngressTelemetry:
    """Counts the requests and calls of the ingress `replica`. `heartbeats` is set before the first scrape."""

    heartbeats: HeartbeatSender

    def __init__(self, config: AppConfig, replica: str) -> None:
        models = [model.name for model in config.models]
        self._metrics = IngressMetrics(replica, models, config.telemetry.opentelemetry_metrics)
        self._models: dict[str, tuple[ModelStatus, int]] = {}

    def meter(self, request: GenerationRequest) -> Meter:
        return self._metrics.meter(request)

    def woke(self, model: str, seconds: float) -> None:
        self._metrics.woke(model, seconds)

    def saw(self, status: ModelStatus, ready: int) -> None:
        """Keep the latest state of a model and the number of its ready replicas."""
        self._models[status.name] = (status, ready)

    def families(self) -> list[Metric]:
        return self._metrics.families(self.heartbeats.lag_s)

    def refused(self, error: ServeAppError, model: str | None) -> None:
        self._metrics.http.refused(error.code, model or "")

    def call_began(self) -> None:
        self._metrics.http.open.inc()

    def call_ended(self, call: HttpCall) -> None:
        self._metrics.http.open.dec()
        self._metrics.http.ended(call)

    async def exposition(self) -> bytes:
        """The metrics of all processes, or of this one alone while the hub does not answer.

        This process reports to the hub like the others, so that no counter was ever higher at another ingress.
        """
        try:
            async with asyncio.timeout(_EXCHANGE_S):
                _, measured = await self.heartbeats.exchange()
        except Exception:
            logger.debug("the hub does not answer", exc_info=True)
            return exposition([], [*self.families(), hub_up(False)])
        now = states((name, status.state, ready) for name, (status, ready) in self._models.items())
        return exposition(measured.parts, [*ages(measured.ages), *now, hub_up(True)])
