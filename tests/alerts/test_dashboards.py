"""The dashboards: texts, queries and links of their panels. test_dashboards_live.py runs the queries in Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from alerts import prometheus, slo
from alerts.__main__ import MONITORING, main
from alerts.dashboards import objectives, promql, write
from alerts.dashboards.panels import COLUMNS
from alerts.settings import EXAMPLE
from serve_app.telemetry.metrics import GenAiSeries
from tests.alerts.test_rules import RECORDED, RULE_FILES, RULES, RUNBOOKS, Document, exported, metrics_in, promtool

FILES = write.files()
DASHBOARDS: dict[str, Document] = {
    Path(name).stem: json.loads(text) for name, text in FILES.items() if name.endswith(".json")
}

# Exported metrics that no panel and no rule uses, with the reason.
UNUSED = {
    "gen_ai_server_request_duration_seconds": "serve_app_request_seconds under another name, if it is switched on",
    "gen_ai_server_time_to_first_token_seconds": "serve_app_time_to_first_token_seconds under another name",
    "gen_ai_server_time_per_output_token_seconds": "serve_app_time_per_output_token_seconds under another name",
}
# Prefixes of the metrics of other programs. The live test checks that they exist; those of vLLM, tests/engines.
OTHERS = ("ray_", "prometheus_", "alertmanager_", "alert_", "alerts_received_", "scrape_", "vllm:")
# Fixed windows that a panel may use: that of an alert, or one for rare events.
FIXED = {"10m", "1h"}


class Query(NamedTuple):
    dashboard: str
    panel: str
    expression: str
    instant: bool


def panels(dashboard: Document) -> list[Document]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def all_queries() -> list[Query]:
    """All queries of panels and annotations."""
    found = [
        Query(uid, panel["title"], target["expr"], target["instant"])
        for uid, dashboard in DASHBOARDS.items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]
    annotations = {one["expr"] for dashboard in DASHBOARDS.values() for one in dashboard["annotations"]["list"]}
    return [*found, *(Query("all", "annotations", expression, False) for expression in annotations)]


def filled(expression: str, **chosen: str) -> str:
    """The query that Grafana sends if `chosen` is selected, or everything."""
    values = {"__rate_interval": "15s", "__range": "10m", "model": ".*", "deployment": ".*", "node": ".*", **chosen}
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


def family(name: str) -> str:
    return re.sub("_(bucket|count|sum)$", "", name)


def used() -> set[str]:
    """The metrics in panels and rules."""
    in_panels = {name for query in all_queries() for name in metrics_in(filled(query.expression))}
    return in_panels | {name for rule in RULES for name in metrics_in(rule["expr"])}


def test_the_command_writes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards", "--output", str(tmp_path / "new")]) == 0
    written = {
        path.relative_to(tmp_path / "new").as_posix(): path.read_text() for path in (tmp_path / "new").rglob("*.*")
    }
    assert written == FILES
    assert capsys.readouterr().out.count("wrote") == len(written)
    assert main(["dashboards", "--output", str(tmp_path / "runbooks"), "--runbooks", "https://llm.test/runbooks/"]) == 0
    for name, text in FILES.items():
        assert (tmp_path / "runbooks" / name).read_text() == text.replace(slo.RUNBOOKS_URL, "https://llm.test/runbooks")
    assert main(["dashboards", "--output", str(tmp_path / "grafana"), "--dashboards", "https://llm.test/d/"]) == 0
    rules = (tmp_path / "grafana/prometheusrule.yaml").read_text()
    assert "https://llm.test/d/serve-app-llm?var-model=" in rules
    assert slo.DASHBOARDS_URL not in rules
    (tmp_path / "file").touch()
    assert main(["dashboards", "--output", str(tmp_path / "file")]) == 2
    assert "give another folder with --output" in capsys.readouterr().err


def test_without_the_sdk_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['grafana_foundation_sdk'] = None; from alerts.__main__ import main; "
    program += f"sys.exit(main(['dashboards', '--output', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=MONITORING.parents[1])
    assert done.returncode == 2
    assert done.stderr == "alerts: grafana-foundation-sdk is not installed; run pip install 'serve_app[dashboards]'\n"
    assert list(tmp_path.iterdir()) == []


def test_there_are_four_dashboards() -> None:
    assert DASHBOARDS.keys() == {"serve-app-alerting", "serve-app-llm", "serve-app-resources", "serve-app-slo"}
    assert all(dashboard["uid"] == uid for uid, dashboard in DASHBOARDS.items())
    assert len({dashboard["title"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)


def problems(panel: Document, runbooks: set[str]) -> Iterator[str]:
    title = panel["title"]
    if len(panel.get("description", "")) < 30:
        yield f"{title}: no description"
    if not panel["fieldConfig"]["defaults"].get("unit"):
        yield f"{title}: no unit"
    if not panel["targets"] or len({target["refId"] for target in panel["targets"]}) < len(panel["targets"]):
        yield f"{title}: no queries, or two with the same name"
    if any(one["datasource"]["uid"] != "${datasource}" for one in (panel, *panel["targets"])):
        yield f"{title}: not from the selected data source"
    for link in panel["links"]:
        base, _, file = link["url"].rpartition("/")
        if base != slo.RUNBOOKS_URL or file not in runbooks:
            yield f"{title}: the runbook does not exist"


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_every_panel_is_described(uid: str) -> None:
    runbooks = {path.name for path in RUNBOOKS}
    dashboard = DASHBOARDS[uid]
    assert [problem for panel in panels(dashboard) for problem in problems(panel, runbooks)] == []
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(titles)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"description": ""}, "no description"),
        ({"fieldConfig": {"defaults": {}}}, "no unit"),
        ({"targets": []}, "no queries"),
        ({"datasource": {"uid": "prometheus"}}, "not from the selected data source"),
        ({"links": [{"url": f"{slo.RUNBOOKS_URL}/Gone.md"}]}, "the runbook does not exist"),
    ],
)
def test_an_incomplete_panel_is_found(change: Document, problem: str) -> None:
    complete = panels(DASHBOARDS["serve-app-llm"])[0]
    (found,) = problems({**complete, **change}, {path.name for path in RUNBOOKS})
    assert problem in found


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panels_fill_the_grid_without_overlap(uid: str) -> None:
    taken = set[tuple[int, int]]()
    for panel in DASHBOARDS[uid]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS, panel["title"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        taken |= cells
    assert len(taken) == COLUMNS * len({y for _, y in taken}), "a line of the grid is not full"


def test_the_queries_use_all_variables() -> None:
    for uid, dashboard in DASHBOARDS.items():
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        in_queries = {name for query in all_queries() if query.dashboard == uid for name in names(query.expression)}
        assert in_queries == variables.keys() - {"datasource"}, uid
        assert variables.pop("datasource")["query"] == "prometheus"
        for variable in variables.values():
            assert variable["multi"]
            assert variable["includeAll"]
            assert variable["allValue"] == ".*"
            assert variable["datasource"]["uid"] == "${datasource}"


def names(expression: str) -> set[str]:
    return {name for name in re.findall(r"\$(\w+)", expression) if not name.startswith("__")}


def test_dashboard_links_of_alerts_are_valid() -> None:
    for rule in RULES:
        if "alert" not in rule:
            continue
        url = rule["annotations"]["dashboard_url"]
        uid, _, query = url.removeprefix(f"{slo.DASHBOARDS_URL}/").partition("?")
        variables = {variable["name"] for variable in DASHBOARDS[uid]["templating"]["list"]}
        given = re.findall(r"var-(\w+)=\{\{ \$labels\.(\w+) \}\}", query)
        assert bool(given) == bool(query), url
        for variable, label in given:
            assert variable in variables, url
            assert variable == label or (variable == "node" and label in ("instance", "NodeAddress"))


def test_rates_use_the_rate_interval() -> None:
    for query in all_queries():
        for function, window in re.findall(r"\b(i?rate|increase|delta)\([^\[]*\[([^\]]*)\]", query.expression):
            allowed = {"$__rate_interval", *(FIXED if function == "increase" else ())}
            assert window in allowed, query
        assert "irate(" not in query.expression


def test_quantiles_aggregate_rates_by_bucket() -> None:
    for query in all_queries():
        found = re.findall(r"histogram_quantile\([\d.]+, sum by \(le", query.expression)
        assert len(found) == query.expression.count("histogram_quantile"), query


def test_queries_avoid_inexact_metrics_of_ray() -> None:
    """The sums of Ray's histograms are estimates, and the unit of its GPU memory is MiB."""
    for query in all_queries():
        assert not re.search(r"\bray_\w+_sum\b", query.expression), query
        if "_gram_" in query.expression:
            assert "1048576" in query.expression, query


def test_no_query_depends_on_the_name_of_a_job() -> None:
    assert [query for query in all_queries() if re.search(r"\bjob *(=|!)", query.expression)] == []


def test_every_metric_of_a_panel_is_exported() -> None:
    known = exported() | RECORDED | {"up", "ALERTS"}
    unknown = {name for name in used() - known if not name.startswith(OTHERS) and not name.startswith("node_")}
    assert unknown == set()


def test_every_exported_metric_is_used_or_listed_as_unused() -> None:
    all_families = {family(name) for name in exported()} | {one.name for one in GenAiSeries("r").families()}
    in_use = {family(name) for name in used()}
    assert all_families - in_use == UNUSED.keys()
    assert not in_use & UNUSED.keys()


def test_thresholds_are_those_of_the_rules() -> None:
    assert promql.threshold("ErrorRateVeryHigh") == 0.1
    assert promql.threshold("TimeToFirstTokenHigh") == 2
    assert promql.threshold("RequestsTurnedAway") == 0.01
    assert promql.threshold("ThroughputLow") == 10
    assert promql.objective("tpot") == 0.05
    assert promql.bucket("ScaleFromZeroSlow") == 60
    (ttft,) = (panel for panel in panels(DASHBOARDS["serve-app-llm"]) if panel["title"] == "TTFT")
    steps = ttft["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert steps == [
        {"color": "green", "value": None},
        {"color": "yellow", "value": 2},
        {"color": "red", "value": 5},
    ]
    (left,) = (panel for panel in panels(DASHBOARDS["serve-app-slo"]) if panel["title"] == "TTFT: budget left")
    steps = left["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [step["color"] for step in steps] == ["red", "yellow", "green"]
    assert [step["value"] for step in steps] == [None, 0, 0.25]


def test_every_objective_has_a_row() -> None:
    titles = {panel["title"] for panel in DASHBOARDS["serve-app-slo"]["panels"]}
    for one in slo.SLOS:
        assert {f"{one.name}: budget left", f"{one.name}: burn rate", f"{one.name}: requests"} <= titles
    assert objectives.FACTORS == (1, 3, 6, 14.4)


@pytest.mark.system
def test_prometheus_accepts_the_queries(tmp_path: Path) -> None:
    queries = sorted({filled(query.expression) for query in all_queries()})
    assert len(queries) > 150
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    promtool("check", "rules", path)


def test_the_kubernetes_manifest_has_every_rule() -> None:
    manifest = yaml.safe_load(FILES["prometheusrule.yaml"])
    assert (manifest["apiVersion"], manifest["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert [rule for group in manifest["spec"]["groups"] for rule in group["rules"]] == RULES


def test_pod_monitors_define_the_jobs_of_the_rules() -> None:
    monitors = list(yaml.safe_load_all((MONITORING / "podmonitor.yaml").read_text()))
    assert {monitor["kind"] for monitor in monitors} == {"PodMonitor"}
    jobs: dict[str, list[str]] = {}
    for monitor in monitors:
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            (job,) = (one["replacement"] for one in endpoint["relabelings"] if one["targetLabel"] == "job")
            jobs.setdefault(job, []).append(endpoint["port"])
    assert jobs == {"serve_app": ["serve"], "ray": ["metrics", "as-metrics", "dash-metrics"]}


def compose() -> Document:
    document: Document = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    return document


def test_containers_listen_on_loopback_and_have_fixed_versions() -> None:
    services: dict[str, Any] = compose()["services"]
    assert services.keys() == {"prometheus", "alertmanager", "grafana", "jaeger"}
    for name, service in services.items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert service["ports"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service.keys() & {"privileged", "network_mode", "env_file"} == set()
        assert service["cap_drop"] == ["ALL"]


def test_no_container_has_a_password() -> None:
    document = compose()
    for service in document["services"].values():
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or (key.endswith("__FILE") and value.startswith("/run/secrets/")), key
    assert document["secrets"] == {"grafana_password": {"file": "./secrets/grafana_password"}}
    ignored = (MONITORING.parents[1] / ".gitignore").read_text().splitlines()
    assert "/cluster/monitoring/secrets/" in ignored


# Created by the commands in docs/operations.md.
CREATED = ("./data", "./secrets", "./alertmanager", "./grafana/dashboards", "./prometheus")


def test_mounted_files_exist_or_are_created() -> None:
    for name, service in compose()["services"].items():
        for volume in service.get("volumes", ()):
            source = volume["source"] if isinstance(volume, dict) else volume.partition(":")[0]
            if source.startswith(("./", "../")) and not source.startswith(CREATED):
                assert (MONITORING / source).exists(), f"{name}: {source}"
            else:
                assert source.startswith((*CREATED, "/tmp/ray")), f"{name}: {source}"
    assert {path for path in FILES if path.startswith("grafana/dashboards/")}
    assert "prometheus.yml" in prometheus.CONFIGS
    page = (MONITORING.parents[1] / "docs/operations.md").read_text()
    assert all(f"data/{name}" in page for name in ("prometheus", "alertmanager", "grafana"))
    assert all(f"python -m alerts {command}" in page for command in ("dashboards", "prometheus", "render"))


def test_mounted_files_are_those_that_render_writes(tmp_path: Path) -> None:
    """With the command of docs/operations.md, in a folder like cluster/monitoring."""
    folder = tmp_path / "cluster/monitoring"
    folder.mkdir(parents=True)
    shutil.copy(EXAMPLE, folder / "settings.yml")
    assert main(["render", "--settings", str(folder / "settings.yml"), "--output", str(folder / "alertmanager")]) == 0
    assert {path.name for path in (folder / "alertmanager/rules").iterdir()} == {path.name for path in RULE_FILES}
    named = re.findall(r'_file: "([^"]*)"', (folder / "alertmanager/alertmanager.yml").read_text())
    assert named
    assert all(name.startswith(f"{folder}/secrets/") for name in named)
    mounts = {name: service.get("volumes", []) for name, service in compose()["services"].items()}
    assert "./alertmanager/rules:/etc/prometheus/rules:ro" in mounts["prometheus"]
    assert "./alertmanager:/etc/alertmanager:ro" in mounts["alertmanager"]
    assert "./secrets:${PWD:?}/secrets:ro" in mounts["alertmanager"]


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    services = compose()["services"]
    sources = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/serve_app.yml").read_text())["datasources"]
    for source in sources:
        host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
        assert any(mapped.endswith(f":{port}") for mapped in services[host]["ports"]), source["name"]
    (default,) = (source for source in sources if source.get("isDefault"))
    assert default["type"] == "prometheus"
    assert f"prometheus:v{default['jsonData']['prometheusVersion']}" in services["prometheus"]["image"]
    (provider,) = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/serve_app.yml").read_text())[
        "providers"
    ]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
