"""All queries of the dashboards against a real Prometheus that watched the real service under load.

No query may be empty. The load of watched.py causes what an idle service does not show: disconnects, a full queue, a
model that scales from zero, accepted draft tokens, and an alert that starts and ends. The GPU metrics are fake, but
written by the code that writes them on a machine with NVML.
"""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.telemetry.metrics import gpu
from tests.alerts.test_dashboards import DASHBOARDS, UNUSED, Query, all_queries, family, filled, panels, used
from tests.alerts.test_rules import BY_NAME, exported
from tests.alerts.watched import DRILL_S, Watched

pytestmark = [pytest.mark.system, pytest.mark.ci, pytest.mark.timeout(720)]


def queries_with_data() -> list[Query]:
    """All queries but those of vLLM, which does not run here."""
    return [one for one in all_queries() if "vllm:" not in one.expression]


def test_every_query_has_a_result(watched: Watched) -> None:
    empty = [one for one in queries_with_data() if not watched.values(filled(one.expression), one.instant)]
    listed = "\n".join(f"{one.dashboard}: {one.panel}: {one.expression}" for one in empty)
    assert not empty, f"{len(empty)} of {len(all_queries())}:\n{listed}"


def test_ratios_are_between_0_and_1(watched: Watched) -> None:
    """A sum that counts something twice, or a wrong denominator, gives a ratio above 1."""
    ratios = {
        (uid, panel["title"])
        for uid, dashboard in DASHBOARDS.items()
        for panel in panels(dashboard)
        if panel["fieldConfig"]["defaults"]["unit"] == "percentunit" and "budget" not in panel["title"].lower()
    }
    assert len(ratios) > 20
    for one in all_queries():
        if (one.dashboard, one.panel) in ratios:
            values = watched.values(filled(one.expression), one.instant)
            most = (
                1.1 if one.panel == "Engine busy" else 1 + 1e-9
            )  # processes send their metrics once per second or later
            assert all(-1e-9 <= value <= most for value in values), (one, min(values), max(values))


def test_the_variables_have_values_and_select_series(watched: Watched) -> None:
    choices = {"model": "toy", "deployment": "model-toy", "node": "127.0.0.1"}
    seen = set[str]()
    for dashboard in DASHBOARDS.values():
        for variable in dashboard["templating"]["list"][1:]:
            query, found = variable["query"], set[str]()
            if query.startswith("label_values("):
                name, label = query.removeprefix("label_values(").removesuffix(")").split(", ")
                found = {str(one[label]) for one in watched.get("series", **{"match[]": name})}
            else:
                query = query.removeprefix("query_result(").removesuffix(")")
                result = watched.get("query", query=query, time=str(watched.ended))["result"]
                found = {one["metric"]["node"] for one in result}
                assert "node-1" in found  # the name of the node in NVML's metrics, which GPU alerts contain
            assert choices[variable["name"]] in found, variable["name"]
            seen.add(variable["name"])
    assert seen == choices.keys()
    for one in queries_with_data():
        if "$model" in one.expression or "$deployment" in one.expression:
            selected = watched.values(filled(one.expression, model="toy", deployment="model-.*"), one.instant)
            of_other_models = one.panel in {"Start from zero", "Rejected requests"}
            assert selected or of_other_models, one


def test_each_name_of_a_node_selects_it(watched: Watched) -> None:
    """Ray's panels find a node by its address, with a port and without."""
    nodes = watched.get("query", query="ray_node_mem_total", time=str(watched.ended))["result"]
    instances = {one["metric"]["instance"] for one in nodes}
    assert instances, nodes
    of_nodes = [one for one in all_queries() if "$node" in one.expression and "ray_" in one.expression]
    assert len(of_nodes) > 8
    for one in of_nodes:
        # The fake GPU has another instance.
        for node in {"127.0.0.1"} if "gram" in one.expression else {*instances, "127.0.0.1"}:
            assert watched.values(filled(one.expression, node=node), one.instant), (one, node, nodes)
        assert not watched.values(filled(one.expression, node="elsewhere"), one.instant), one


def test_mttd_and_mttr_are_those_of_the_drill(watched: Watched) -> None:
    (mttd,) = {one.expression for one in all_queries() if one.panel == "MTTD"}
    (mttr,) = {one.expression for one in all_queries() if one.panel == "MTTR"}
    assert all(0 <= value < 10 for value in watched.values(filled(mttd), True))
    (resolution,) = watched.values(filled(mttr), True)
    assert DRILL_S - 10 < resolution < DRILL_S + 10


def test_the_service_exports_the_metrics_of_the_static_tests(watched: Watched) -> None:
    there = {sample.name for one in text_string_to_metric_families(watched.page) for sample in one.samples}
    graphics = {one.name for one in gpu().values()}
    assert {family(name) for name in there} == {family(name) for name in exported()} - graphics
    assert {family(name) for name in there} - {family(name) for name in used()} <= UNUSED.keys()


def test_no_rule_failed_and_no_unknown_alert_fired(watched: Watched) -> None:
    failures = watched.values("sum(prometheus_rule_evaluation_failures_total)", True)
    assert failures == [0]
    firing = watched.get("query", query='ALERTS{alertstate="firing"}', time=str(watched.ended))["result"]
    names = {one["metric"]["alertname"] for one in firing}
    assert {"Watchdog", "DrillThatGoesOn"} <= names
    assert names <= BY_NAME.keys() | {"DrillThatGoesOn", "DrillThatEnds"}
