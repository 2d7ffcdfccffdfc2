"""Sends the heartbeat and the metrics of a process to all ingresses, once per second."""

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
# Without this limit a call to a lost node can take minutes.
_SEND_TIMEOUT_S = 2.0

Report = tuple[Heartbeat, MetricsSnapshot]
Send = Callable[[Report], Awaitable[object]]


class Reporter:
    """Sends the reports of this process until it is stopped. Needs a running event loop; `lag_s` is its delay."""

    def __init__(self, send: Send, heartbeat: Callable[[], Heartbeat], families: Callable[[], list[Metric]]) -> None:
        self._send = send
        self._heartbeat = heartbeat
        self._families = families
        self._writer = Writer()
        self.lag_s = 0.0
        self._task = asyncio.create_task(self._send_forever())

    def report(self) -> Report:
        """The current heartbeat and metrics of this process."""
        return self._heartbeat(), self._writer.snapshot(self._families())

    async def send(self, heartbeat: Heartbeat | None = None) -> None:
        """Send a report now. An error is only logged, because the next report replaces this one."""
        current, metrics = self.report()
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._send((heartbeat or current, metrics))
        except Exception:
            logger.debug("the report was not sent", exc_info=True)

    async def stop(self, last: Heartbeat) -> None:
        """Send one last report, with the heartbeat `last`; takes at most 1 s."""
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
    """A function that sends a report by calling `method` on every running replica of a deployment."""

    async def send(report: Report) -> None:
        await handle.broadcast(method, *report).results_async(timeout_s=_SEND_TIMEOUT_S, return_exceptions=True)

    return send
