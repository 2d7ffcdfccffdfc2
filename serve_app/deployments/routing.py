"""The routing tables of this process, and the argument by which a call is routed."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from serve_app.config import deployment_name
from serve_app.core.routing import RoutingKey
from serve_app.gateway.routing_table import RoutingTable


class Routed(NamedTuple):
    """The last argument of a call that is routed by its key; `number` is unique among the calls of this process."""

    number: int
    key: RoutingKey


_tables: defaultdict[str, RoutingTable] = defaultdict(RoutingTable)


def routing_table(model: str) -> RoutingTable:
    """The table of a model, which the ingress fills from the reports of the replicas."""
    return table_of(deployment_name(model))


def table_of(deployment: str) -> RoutingTable:
    """The table of the model with this Ray Serve deployment."""
    return _tables[deployment]
