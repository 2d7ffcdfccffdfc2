"""The reports of every process to all ingresses, once a second: its heartbeat and its metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from prometheus_client.metrics_core import Metric
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.registry import Heartbeat
from serve_app.telemetry.exposition import MetricsSnapshot, Writer

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
# A call to a lost node can stay without an answer for minutes.
_SEND_TIMEOUT_S = 2.0

Report = tuple[Heartbeat, MetricsSnapshot]
Send = Callable[[Report], Awaitable[object]]


class Reporter:
    """Sends what this process reports until it is stopped. On an event loop only. `lag_s`: how late the loop was."""

    def __init__(self, send: Send, heartbeat: Callable[[], Heartbeat], families: Callable[[], list[Metric]]) -> None:
        self._send = send
        self._heartbeat = heartbeat
        self._families = families
        self._writer = Writer()
        self.lag_s = 0.0
        self._task = asyncio.create_task(self._send_forever())

    def report(self) -> Report:
        """What this process reports now."""
        return self._heartbeat(), self._writer.snapshot(self._families())

    async def send(self, heartbeat: Heartbeat | None = None) -> None:
        """Send a report now. Errors are logged only: the next report says everything again."""
        current, metrics = self.report()
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._send((heartbeat or current, metrics))
        except Exception:
            logger.debug("the report was not sent", exc_info=True)

    async def stop(self, last: Heartbeat) -> None:
        """Send one last report, with this heartbeat."""
        self._task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL_S):
                await self.send(last)

    async def _send_forever(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self.send()
            due = clock() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self.lag_s = max(0.0, clock() - due)


def to_every_replica(handle: DeploymentHandle, method: str) -> Send:
    """A way to send reports: a call of `method` on every running replica of a deployment."""

    async def send(report: Report) -> None:
        await handle.broadcast(method, *report).results_async(timeout_s=_SEND_TIMEOUT_S, return_exceptions=True)

    return send
