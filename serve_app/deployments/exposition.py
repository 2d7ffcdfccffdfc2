"""From what several processes measure to one text for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class _Merged(Collector):
    """Families of several processes, those of the same name joined."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        by_name: dict[str, Metric] = {}
        for family in self._families:
            known = by_name.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples.extend(family.samples)
        return by_name.values()


def exposition(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format of families from any number of processes."""
    registry = CollectorRegistry()
    registry.register(_Merged(list(families)))
    return generate_latest(registry)
