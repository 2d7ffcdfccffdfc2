"""An HTTP call that has ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One HTTP call that has ended. `route` is a pattern of ours or "other"; sizes are of bodies, in bytes.

    `status` is None if the client left before it was sent one.
    """

    route: str
    method: str
    status: int | None
    seconds: float
    received: int
    sent: int
