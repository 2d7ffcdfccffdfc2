"""Temporary: the old Gateway over the Engine protocol, until the routes use it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any


class Shim:
    def __init__(self, engine: Any, telemetry: Any, config: Any) -> None:
        self._engine, self._telemetry, self._config = engine, telemetry, config
        self.refused, self.call_began, self.call_ended = telemetry.refused, telemetry.call_began, telemetry.call_ended

    def stream(self, request: Any, warm_wait_s: Any = None) -> Any:
        return self._engine.generate(replace(request, wake_wait_s=warm_wait_s))

    async def query(self, model: Any, query: Any, warm_wait_s: Any) -> Any:
        return await self._engine.query(model, query, time.monotonic() + warm_wait_s)

    def waiting_on(self, model: str) -> str:
        return "queued" if self._engine.health(model).state == "ready" else "warming"

    async def models(self) -> Any:
        return [self._engine.health(model.name) for model in self._config.models]

    async def metrics(self) -> bytes:
        return await self._telemetry.exposition()  # type: ignore[no-any-return]
