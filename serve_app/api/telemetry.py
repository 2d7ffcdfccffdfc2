"""What the HTTP layer reports about its calls, and the metrics page that it serves."""

from __future__ import annotations

from typing import Protocol

from serve_app.core.http import HttpCall
from serve_app.errors import ServeAppError


class ServiceTelemetry(Protocol):
    def refused(self, error: ServeAppError, model: str | None) -> None:
        """Count a request that was answered with an error before or instead of its end."""
        ...

    def call_began(self) -> None:
        """Count an HTTP call that has arrived, whatever its path."""
        ...

    def call_ended(self, call: HttpCall) -> None:
        """Count an HTTP call that has ended."""
        ...

    async def exposition(self) -> bytes:
        """The whole service's metrics in Prometheus' text format."""
        ...
