"""An HTTP call that has ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One HTTP call that has ended: what the metrics need to know about it.

    `route` is the pattern of the route, for example "/v1/models/{id}"; "other" for a path without a route. `status` is
    None if the client left before the response began. `received` and `sent` are the sizes of the bodies in bytes.
    """

    route: str
    method: str
    status: int | None
    seconds: float
    received: int
    sent: int
