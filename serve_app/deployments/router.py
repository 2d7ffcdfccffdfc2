"""Ray Serve's request router for models: chooses replicas by the RoutingTable of their deployment.

The only module that uses Ray's interface for request routers, which is in alpha. Ray pickles this module by value, so
that another process has copies of what is defined here: everything that is shared is in other modules.
"""

from __future__ import annotations

import time
from array import array

from ray.serve._private.replica_result import ReplicaResult
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.core.routing import RoutingKey
from serve_app.deployments.routing import Routed, table_of

_NO_KEY = RoutingKey(array("Q"), 0.0)


class TableRouter(FIFOMixin, RequestRouter):
    """Asks no replica for its load, because the replicas report it. A call without a Routed goes to any replica.

    Ray knows a waiting call by the HTTP request that it belongs to. FIFOMixin serves the calls of one HTTP request in
    their order; without it, only the first one is ever served.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        routed = _routed(pending_request)
        table = table_of(self._deployment_id.name)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        now = time.monotonic()
        chosen = table.choose(list(by_id), routed.key if routed else _NO_KEY, now)
        if routed and chosen and not table.avoided(chosen[0], now):  # a lost replica does not receive the request
            table.sent(chosen[0], routed.number, routed.key)
        for replica in map(by_id.__getitem__, chosen):
            if self._replica_queue_len_cache.get(replica.replica_id) is None:
                # Ray asks a replica for the length of its queue if it does not know the length.
                self._replica_queue_len_cache.update(replica.replica_id, 0)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # before the replicas are compared once more
        return [[by_id[replica]] for replica in chosen]

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """A call of the replica failed, but Ray does not know yet whether it has died."""
        super().on_replica_actor_unavailable(replica_id)
        table_of(self._deployment_id.name).lost(replica_id.unique_id, time.monotonic())

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """The replica has accepted the request; it is another one if the best one was full."""
        table, routed = table_of(self._deployment_id.name), _routed(pending_request)
        if routed and table.assigned(routed.number) != replica_id.unique_id:
            table.sent(replica_id.unique_id, routed.number, routed.key)


def _routed(request: PendingRequest | None) -> Routed | None:
    last = request.args[-1] if request is not None and request.args else None
    return last if isinstance(last, Routed) else None


def router_config() -> RequestRouterConfig:
    return RequestRouterConfig(request_router_class=f"{__name__}.{TableRouter.__name__}")
