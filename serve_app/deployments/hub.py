"""The deployment that holds the registry, and the heartbeats of every process to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.registry import Heartbeat, Measurements, RegistrySnapshot, ReplicaRegistry
from serve_app.telemetry.exposition import MetricsSnapshot, Writer

logger = logging.getLogger("ray.serve")

HEARTBEAT_INTERVAL_S = 1.0
_SEND_TIMEOUT_S = 2.0


@serve.deployment
class Hub:
    """One process that holds the registry."""

    def __init__(self) -> None:
        self._registry = ReplicaRegistry()

    async def push(self, heartbeat: Heartbeat, metrics: MetricsSnapshot) -> RegistrySnapshot:
        """Take a report in; returns the state of all processes."""
        self._registry.take(heartbeat, metrics)
        return self._registry.snapshot()

    async def snapshot(self) -> RegistrySnapshot:
        return self._registry.snapshot()

    async def exchange(self, heartbeat: Heartbeat, metrics: MetricsSnapshot) -> tuple[RegistrySnapshot, Measurements]:
        """Take a report in; returns the state and the metrics of all processes."""
        self._registry.take(heartbeat, metrics)
        return self._registry.snapshot(), self._registry.measurements()


class HeartbeatSender:
    """Reports this process to the hub every second until it is stopped. On an event loop only.

    `seen` is called with the state of all processes after every report.
    """

    def __init__(
        self,
        hub: DeploymentHandle,
        heartbeat: Callable[[], Heartbeat],
        families: Callable[[], list[Metric]],
        seen: Callable[[RegistrySnapshot], None] | None = None,
    ) -> None:
        self._hub = hub
        self._heartbeat = heartbeat
        self._families = families
        self._seen = seen
        self._writer = Writer()
        self.lag_s = 0.0
        self._task = asyncio.create_task(self._send_forever())

    async def send(self) -> None:
        await self._send(self._heartbeat())

    async def stop(self, last: Heartbeat) -> None:
        """Send one last report."""
        self._task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                await self._send(last)

    async def exchange(self) -> tuple[RegistrySnapshot, Measurements]:
        """Report, and return what all processes have reported. Raises what the handle raises."""
        reported: tuple[RegistrySnapshot, Measurements] = await self._hub.exchange.remote(
            self._heartbeat(), self.snapshot()
        )
        return reported

    def snapshot(self) -> MetricsSnapshot:
        """The metrics of this process now."""
        return self._writer.snapshot(self._families())

    async def _send(self, heartbeat: Heartbeat) -> None:
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):  # a call to a lost node can stay without an answer for minutes
                state: RegistrySnapshot = await self._hub.push.remote(heartbeat, self.snapshot())
        except Exception:
            # The hub may be starting or moving; the next report says everything again.
            logger.debug("the heartbeat was not sent", exc_info=True)
            return
        if self._seen is not None:
            self._seen(state)

    async def _send_forever(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self.send()
            due = clock() + HEARTBEAT_INTERVAL_S
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            self.lag_s = max(0.0, clock() - due)
