"""The tables of docs/operations.md are what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics_core import Metric

from serve_app.telemetry.metrics import GenAiSeries
from tests.alerts.test_rules import families

TEXT = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def exposed(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def test_every_metric_is_described_with_its_labels() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*) \| (.*) \|$", TEXT, re.MULTILINE)
    told = {(name, kind, frozenset(filter(None, labels.split(", "))), text) for name, kind, labels, text in rows}
    real = {
        (
            exposed(family),
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels if label != "le"),
            family.documentation,
        )
        for family in families()
    }
    assert told == real


def test_opentelemetrys_names_are_told() -> None:
    assert [family.name for family in GenAiSeries("r").families() if f"`{family.name}`" not in TEXT] == []
