"""The metric tables of docs/operations.md match the code."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric

from serve_app.config import Limits
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


@pytest.mark.parametrize("name", ["request_seconds", "decode_seconds", "model_wake_seconds"])
def test_the_largest_bound_is_the_default_time_limit_of_a_request(name: str) -> None:
    (family,) = (one for one in families() if one.name == f"serve_app_{name}")
    bounds = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels} - {math.inf}
    assert max(bounds) == Limits().request_timeout_s


def test_opentelemetry_metrics_are_documented() -> None:
    assert [family.name for family in GenAiSeries("r").families() if f"`{family.name}`" not in TEXT] == []
