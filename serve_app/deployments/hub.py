"""Where the service's notice board hangs, and how every process pushes to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.registry import Heartbeat, Measured, RegistrySnapshot, ReplicaRegistry
from serve_app.telemetry.exposition import MetricsSnapshot, Writer

logger = logging.getLogger("ray.serve")

PUSH_INTERVAL_S = 1.0
_PUSH_S = 2.0


@serve.deployment
class Hub:
    """A process that holds the board."""

    def __init__(self) -> None:
        self._notices = ReplicaRegistry()

    async def push(self, notice: Heartbeat, page: MetricsSnapshot) -> None:
        self._notices.take(notice, page)

    async def board(self) -> RegistrySnapshot:
        return self._notices.board()

    async def exchange(self, notice: Heartbeat, page: MetricsSnapshot) -> tuple[RegistrySnapshot, Measured]:
        """Take a push, and show all."""
        self._notices.take(notice, page)
        return self._notices.board(), self._notices.measured()


class Pusher:
    """Pushes what a process has to say, every second until it is stopped. On an event loop only."""

    def __init__(
        self, hub: DeploymentHandle, notice: Callable[[], Heartbeat], families: Callable[[], list[Metric]]
    ) -> None:
        self._hub = hub
        self._notice = notice
        self._families = families
        self._writer = Writer()
        self.lag_s = 0.0
        self._task = asyncio.create_task(self._push_for_ever())

    async def stop(self, notice: Heartbeat) -> None:
        """Say one last thing."""
        self._task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(PUSH_INTERVAL_S):
                await self._push(notice)

    async def push(self) -> None:
        await self._push(self._notice())

    async def exchange(self) -> tuple[RegistrySnapshot, Measured]:
        """Push, and see what all have pushed. Raises what the handle raises."""
        shown: tuple[RegistrySnapshot, Measured] = await self._hub.exchange.remote(self._notice(), self.page())
        return shown

    def page(self) -> MetricsSnapshot:
        """What this process measures now."""
        return self._writer.page(self._families())

    async def _push(self, notice: Heartbeat) -> None:
        try:
            async with asyncio.timeout(_PUSH_S):  # a node that was lost without a word answers nothing for minutes
                await self._hub.push.remote(notice, self.page())
        except Exception:
            # The hub may be starting or moving; the next push says everything again.
            logger.debug("push failed", exc_info=True)

    async def _push_for_ever(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self.push()
            due = clock() + PUSH_INTERVAL_S
            await asyncio.sleep(PUSH_INTERVAL_S)
            self.lag_s = max(0.0, clock() - due)
