"""Batch jobs and shared idempotency keys of one ingress: their database, and the worker that runs lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from serve_app.api.batch_lines import BatchLines
from serve_app.api.context import RequestContext
from serve_app.api.experiments import Experiments
from serve_app.api.openai_batches.service import BatchService
from serve_app.config import AppConfig
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import Engine
from serve_app.deployments.ingress_telemetry import IngressTelemetry
from serve_app.gateway.background import Background
from serve_app.jobs.answers import AnswerStore

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore
    from serve_app.jobs.worker import BatchWorker


class IngressJobs:
    """`service` is None without batches, and `answers` unless the ingresses share answers. `replica` is the id.

    Without both, SQLAlchemy is not imported, which takes 0.2 s.
    """

    def __init__(self, config: AppConfig, replica: str, telemetry: IngressTelemetry) -> None:
        self._config = config
        self._replica = replica
        self._telemetry = telemetry
        self._store: JobStore | None = None
        self._worker: BatchWorker | None = None
        self.service: BatchService | None = None
        self.answers: AnswerStore | None = None
        keys = config.idempotency
        if config.batches is None and not (keys.shared and keys.max_kept):
            return
        from serve_app.jobs.shared_answers import SharedAnswers
        from serve_app.jobs.store import JobStore

        self._store = JobStore(config.database, telemetry.jobs.failed)
        if config.batches is not None:
            self.service = BatchService(self._store, config.batches, self._wake)
        if keys.shared and keys.max_kept:
            self.answers = SharedAnswers(self._store, keys, replica)

    def start(self, engine: Engine, adapters: AdapterDirectory, experiments: Experiments) -> None:
        """Begin to run batches over the engine of the gateway."""
        config = self._config
        if config.batches is None or self._store is None:
            return
        from serve_app.jobs.worker import BatchWorker

        lines = BatchLines(
            RequestContext(
                Background(engine), self._telemetry, config, time.monotonic, adapters, experiments=experiments
            )
        )
        self._worker = BatchWorker(
            self._store, config.batches, config.limits.max_body_bytes, self._replica, lines, self._telemetry.jobs
        )
        self._worker.start()

    async def stop(self) -> None:
        """Stop, and leave the lines that run to other ingresses."""
        if self._worker is not None:
            await self._worker.stop()
        if self.answers is not None:
            await self.answers.close()
        if self._store is not None:
            await self._store.close()

    def _wake(self) -> None:
        if self._worker is not None:
            self._worker.wake()
