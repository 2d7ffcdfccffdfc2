"""The ServiceTelemetry protocol: what the HTTP layer reports, and the text of /metrics."""

from __future__ import annotations

from typing import Protocol

from serve_app.core.http import HttpCall
from serve_app.errors import ServeAppError


class ServiceTelemetry(Protocol):
    """Counts HTTP calls, errors and stored responses of this process."""

    def refused(self, error: ServeAppError, model: str | None) -> None:
        """Count an error that a caller got. `model` is None if the request named no existing model."""
        ...

    def auth_refused(self, reason: str) -> None:
        """Count a call that was refused for one of `core.tenants.REASONS`."""
        ...

    def call_began(self) -> None:
        """Count an HTTP call that has begun."""
        ...

    def call_ended(self, call: HttpCall) -> None:
        """Count an HTTP call that has ended."""
        ...

    def responses_stored(self, count: int, size: int, removed: int) -> None:
        """Record the number of stored responses and their size in bytes, and count the ones removed by a limit."""
        ...

    async def exposition(self) -> bytes:
        """The metrics of the whole service in Prometheus' text format."""
        ...
