"""Reports the work that waits at an ingress to the autoscaler: now and then, and at once while a model sleeps."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable

from serve_app.config import Model
from serve_app.deployments import work_reports
from serve_app.deployments.work_reports import WorkReport

logger = logging.getLogger("ray.serve")

# A report is sent when it has changed, as often as the autoscaler decides, and otherwise to show that the ingress runs.
_INTERVAL_S = 0.5
_UNCHANGED_S = 2.0
# The requests of a herd arrive within this time, and are one report.
_HERD_S = 0.02


class WorkReporter:
    """Sends `report(model)` of the models that are scaled by work, from its creation on. Needs a running event loop."""

    def __init__(
        self, application: str, ingress: str, models: Iterable[Model], report: Callable[[str], WorkReport]
    ) -> None:
        self._application = application
        self._ingress = ingress
        self._report = report
        self._models = [m.name for m in models if m.deployment.autoscaling and m.deployment.autoscaling.by_work]
        self._numbers = itertools.count()
        self._sent: dict[str, tuple[WorkReport, float]] = {}
        self._urgent = asyncio.Event()
        self._task = asyncio.create_task(self._send_forever()) if self._models else None

    def send_soon(self, model: str) -> None:
        """Send the report of a model within a few milliseconds."""
        self._sent.pop(model, None)
        self._urgent.set()

    async def stop(self) -> None:
        """Withdraw the reports of this ingress."""
        if self._task is None:
            return
        self._task.cancel()
        try:
            for model in self._models:
                await asyncio.to_thread(work_reports.withdraw, self._application, model, self._ingress)
        except Exception:
            logger.debug("the work reports were not withdrawn", exc_info=True)

    async def _send_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await self._urgent.wait()
                await asyncio.sleep(_HERD_S)
            except TimeoutError:
                pass
            self._urgent.clear()
            try:
                for model in self._models:
                    await self._send(model)
            except Exception:
                logger.exception("the autoscaler has no report of this ingress")

    async def _send(self, model: str) -> None:
        now, report = asyncio.get_running_loop().time(), self._report(model)
        last, at = self._sent.get(model, (None, 0.0))
        if report == last and now - at < _UNCHANGED_S:
            return
        self._sent[model] = report, now
        number = next(self._numbers)
        await asyncio.to_thread(work_reports.send, self._application, model, self._ingress, report, number)
