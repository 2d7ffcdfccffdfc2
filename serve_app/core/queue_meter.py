"""What measures the queue of a model."""

from __future__ import annotations

from typing import Literal, Protocol

# Why the queue refused a request: it was full; it was full and another tenant had fewer requests in it, so that this
# one was dropped; or the request could not expect a place in time.
RefusalReason = Literal["full", "dropped", "late"]


class QueueMeter(Protocol):
    """Measures the queue of one model."""

    def started(self, tenant: str, seconds: float) -> None:
        """A request of a tenant has a place, after so many seconds."""
        ...

    def refused(self, reason: RefusalReason) -> None:
        """A request was refused."""
        ...


class Unmeasured:
    """A meter that measures nothing."""

    def started(self, tenant: str, seconds: float) -> None:
        pass

    def refused(self, reason: RefusalReason) -> None:
        pass
