"""The service's notice board: what every process measures, and how far loading models have come."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ray import serve

from serve_app.deployments.metrics import Metric

# Pushes come every second; a process that missed this many seconds of them is gone.
FORGET_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Notice:
    """One process's push. `stage` is what a replica that cannot answer yet is doing."""

    replica: str
    model: str
    stage: str
    families: list[Metric]


@serve.deployment
class Hub:
    """Keeps the latest notice of every process, for as long as it keeps coming. Holds nothing that cannot be lost."""

    def __init__(self) -> None:
        self._notices: dict[str, tuple[float, Notice]] = {}

    async def push(self, notice: Notice) -> None:
        self._notices[notice.replica] = (time.monotonic(), notice)

    async def notices(self) -> list[Notice]:
        fresh = time.monotonic() - FORGET_AFTER_S
        self._notices = {key: entry for key, entry in self._notices.items() if entry[0] >= fresh}
        return [notice for _, notice in self._notices.values()]
