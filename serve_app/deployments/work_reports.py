"""Passes what callers want of the models from the ingresses to the autoscaler, by the key-value store of Ray's GCS.

Ray Serve's own metrics of replicas come every 10 s, and not at all while a model has no replica. The store is in the
process that keeps the state of the cluster, so that the reports outlive the controller of Ray Serve.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ray.experimental import internal_kv

from serve_app.core.scaling import Demand, ReplicaSpeed

_NAMESPACE = b"serve_app"
# A report that has not changed for this time is of an ingress that has ended. An ingress sends one every 2 s.
FRESH_S = 8.0


@dataclass(frozen=True, slots=True)
class WorkReport:
    """What callers want of a model, as one ingress knows it, and what the replicas have shown, by their ids."""

    demand: Demand
    replicas: dict[str, ReplicaSpeed]


def send(application: str, model: str, ingress: str, report: WorkReport, number: int) -> None:
    """Replace the report of an ingress. `number` must differ from that of the report before. Blocks for about 1 ms."""
    content = {
        "number": number,
        "demand": asdict(report.demand),
        "replicas": {replica: asdict(speed) for replica, speed in report.replicas.items()},
    }
    internal_kv._internal_kv_put(
        _prefix(application, model) + ingress.encode(), json.dumps(content).encode(), True, namespace=_NAMESPACE
    )


def withdraw(application: str, model: str, ingress: str) -> None:
    """Remove the report of an ingress that ends."""
    internal_kv._internal_kv_del(_prefix(application, model) + ingress.encode(), namespace=_NAMESPACE)


class WorkReports:
    """Reads the reports of all ingresses about one model. A report counts until it has not changed for FRESH_S."""

    def __init__(self, application: str, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._prefix = _prefix(application, model)
        self._clock = clock
        self._seen: dict[bytes, tuple[int, float]] = {}

    def read(self) -> list[WorkReport]:
        """The reports that count. Blocks for about 1 ms for each ingress."""
        now, found = self._clock(), []
        keys: Sequence[bytes] = internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE)
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
        for key in keys:
            content = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
            if content is None:
                continue
            fields = json.loads(content)
            number, since = self._seen.get(key, (None, now))
            if fields["number"] != number:
                since = now
            self._seen[key] = (fields["number"], since)
            if now - since < FRESH_S:
                speeds = {replica: ReplicaSpeed(**speed) for replica, speed in fields["replicas"].items()}
                found.append(WorkReport(Demand(**fields["demand"]), speeds))
        return found


def _prefix(application: str, model: str) -> bytes:
    return f"work/{application}/{model}/".encode()
