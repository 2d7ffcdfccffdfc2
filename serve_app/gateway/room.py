"""The number of requests of a model that one ingress sends to its replicas, and that it lets wait."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.config import Deployment

# A replica gets one request more for each so many slots, so that the next one is there when a slot becomes free.
_SLOTS_PER_SPARE = 8


@dataclass(frozen=True, slots=True)
class Room:
    """What a model has for the requests of one ingress.

    `slots` are computed together, and `places` requests are sent to the replicas, so that some are ready when a slot is
    free. `total` requests are accepted: those without a place wait at the ingress.
    """

    slots: int
    places: int
    total: int


def room_of(deployment: Deployment, slots: int | None, ready: int, ingresses: int) -> Room:
    """The share that one of the `ingresses` has of `ready` replicas, each of which runs `slots` sequences, if known.

    A replica gets few requests more than it has slots. The others of its `max_ongoing_requests` wait at the ingress,
    because the order in which a replica serves them is not fair to tenants. If Ray Serve sizes the deployment by its
    requests, replicas get all of them, because Ray counts those at replicas only. There is room for one replica also
    when none is ready, for the first requests after a start.
    """
    ongoing = deployment.max_ongoing_requests
    slots = min(ongoing, slots or ongoing)
    scaling = deployment.autoscaling
    places = places_of_replica(slots, ongoing) if scaling is None or scaling.by_work else ongoing

    def share(of_replica: int) -> int:
        return -(-max(1, ready) * of_replica // max(1, ingresses))

    return Room(share(slots), share(places), share(ongoing) + deployment.max_queued_requests)


def places_of_replica(slots: int, ongoing: int) -> int:
    """The requests that a replica with so many slots gets at most, if it takes `ongoing`."""
    return min(ongoing, slots + -(-slots // _SLOTS_PER_SPARE))
