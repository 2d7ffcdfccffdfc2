"""The metric tables of docs/operations.md match the code."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics_core import Metric

from serve_app.telemetry.metrics import GenAiSeries
from tests.alerts.test_rules import families

TEXT = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def exposed_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def test_every_metric_is_documented_with_its_type_labels_and_help_text() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*) \| (.*) \|$", TEXT, re.MULTILINE)
    documented = {(name, kind, frozenset(filter(None, labels.split(", "))), text) for name, kind, labels, text in rows}
    defined = {
        (
            exposed_name(family),
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels if label != "le"),
            family.documentation,
        )
        for family in families()
    }
    assert documented == defined


def test_opentelemetry_metrics_are_documented() -> None:
    assert [family.name for family in GenAiSeries("r").families() if f"`{family.name}`" not in TEXT] == []
