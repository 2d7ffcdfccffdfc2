"""Metrics that a library keeps in the registry of prometheus_client in this process, for example vLLM's."""

from __future__ import annotations

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

# vLLM names its metrics like this. Other programs that write to the registry report them elsewhere.
_PREFIXES = ("vllm:",)


def families(model: str, replica: str) -> list[Metric]:
    """The metrics of libraries, by their names, with the labels of this service besides their own."""
    labels = {"model": model, "replica": replica}
    return [_labelled(family, labels) for family in REGISTRY.collect() if family.name.startswith(_PREFIXES)]


def _labelled(family: Metric, labels: dict[str, str]) -> Metric:
    """The family with more labels, without the samples that tell when a counter was created."""
    labelled = Metric(family.name, family.documentation, family.type)
    labelled.samples = [
        sample._replace(labels=sample.labels | labels)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return labelled
