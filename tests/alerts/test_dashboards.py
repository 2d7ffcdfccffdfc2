"""The dashboards: what their panels say, ask and link to. test_dashboards_live.py asks a real Prometheus."""

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

from alerts import slo
from alerts.__main__ import MONITORING, main
from alerts.dashboards import objectives, promql, write
from alerts.dashboards.panels import COLUMNS
from alerts.settings import EXAMPLE
from serve_app.telemetry.metrics import GenAiSeries
from tests.alerts.test_rules import RECORDED, RULE_FILES, RULES, RUNBOOKS, Document, exported, metrics_in, promtool

BOARDS: dict[str, Document] = {}
for _name, _text in write.files().items():
    if _name.endswith(".json"):
        BOARDS[Path(_name).stem] = json.loads(_text)

# Exported and on no panel and in no rule, with the reason.
UNUSED = {
    "gen_ai_server_request_duration_seconds": "serve_app_request_seconds by another name, if a switch is set",
    "gen_ai_server_time_to_first_token_seconds": "likewise serve_app_time_to_first_token_seconds",
    "gen_ai_server_time_per_output_token_seconds": "likewise serve_app_time_per_output_token_seconds",
}
# What others export; the live test proves that they do.
OTHERS = ("ray_", "prometheus_", "alertmanager_", "alert_", "alerts_received_", "scrape_")
# Windows that a panel may have whatever the range is: as long as the alert's beside it, or as rare as what it counts.
FIXED = {"10m", "1h"}


class Question(NamedTuple):
    board: str
    panel: str
    expression: str
    instant: bool


def panels(board: Document) -> list[Document]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def questions() -> list[Question]:
    """Everything that is asked of Prometheus but for the variables' choices."""
    found = [
        Question(uid, panel["title"], target["expr"], target["instant"])
        for uid, board in BOARDS.items()
        for panel in panels(board)
        for target in panel["targets"]
    ]
    marks = {one["expr"] for board in BOARDS.values() for one in board["annotations"]["list"]}
    return [*found, *(Question("each", "Alerts, as marks", expression, False) for expression in marks)]


def filled(expression: str, **chosen: str) -> str:
    """What Grafana sends: with all of each variable, unless something is chosen."""
    values = {"__rate_interval": "15s", "__range": "10m", "model": ".*", "deployment": ".*", "node": ".*", **chosen}
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


def family(name: str) -> str:
    return re.sub("_(bucket|count|sum)$", "", name)


def used() -> set[str]:
    """Names of series in panels and rules."""
    asked = {name for question in questions() for name in metrics_in(filled(question.expression))}
    return asked | {name for rule in RULES for name in metrics_in(rule["expr"])}


@pytest.mark.parametrize("name", write.files())
def test_the_files_are_those_of_the_tables(name: str) -> None:
    assert (MONITORING / name).read_text() == write.files()[name], "run: python -m alerts dashboards"


def test_the_command_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards", "--output", str(tmp_path / "new")]) == 0
    written = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.*")}
    assert written == write.files().keys()
    assert capsys.readouterr().out.count("wrote") == len(written)
    assert main(["dashboards", "--output", str(tmp_path / "ours"), "--runbooks", "https://llm.test/runbooks/"]) == 0
    for name, text in write.files().items():
        assert (tmp_path / "ours" / name).read_text() == text.replace(slo.RUNBOOKS, "https://llm.test/runbooks")
    assert main(["dashboards", "--output", str(tmp_path / "grafana"), "--dashboards", "https://llm.test/d/"]) == 0
    rules = (tmp_path / "grafana/prometheusrule.yaml").read_text()
    assert "https://llm.test/d/serve-app-llm?var-model=" in rules
    assert slo.DASHBOARDS not in rules
    (tmp_path / "file").touch()
    assert main(["dashboards", "--output", str(tmp_path / "file")]) == 2
    assert "give another --output" in capsys.readouterr().err


def test_without_the_sdk_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['grafana_foundation_sdk'] = None; from alerts.__main__ import main; "
    program += f"sys.exit(main(['dashboards', '--output', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=MONITORING.parents[1])
    assert done.returncode == 2
    assert done.stderr == "alerts: grafana-foundation-sdk is missing; pip install 'serve_app[dashboards]'\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_among_the_dashboards() -> None:
    there = {path.stem for path in (MONITORING / "grafana/dashboards").iterdir()}
    assert there == BOARDS.keys() == {"serve-app-alerting", "serve-app-llm", "serve-app-resources", "serve-app-slo"}
    assert all(board["uid"] == uid for uid, board in BOARDS.items())
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


def lacks(panel: Document, runbooks: set[str]) -> Iterator[str]:
    title = panel["title"]
    if len(panel.get("description", "")) < 30:
        yield f"{title}: no description"
    if not panel["fieldConfig"]["defaults"].get("unit"):
        yield f"{title}: no unit"
    if not panel["targets"] or len({target["refId"] for target in panel["targets"]}) < len(panel["targets"]):
        yield f"{title}: no questions, or two with one name"
    if any(one["datasource"]["uid"] != "${datasource}" for one in (panel, *panel["targets"])):
        yield f"{title}: not from the chosen data source"
    for link in panel["links"]:
        base, _, file = link["url"].rpartition("/")
        if base != slo.RUNBOOKS or file not in runbooks:
            yield f"{title}: no such runbook"


@pytest.mark.parametrize("uid", BOARDS)
def test_every_panel_says_what_it_is(uid: str) -> None:
    runbooks = {path.name for path in RUNBOOKS}
    board = BOARDS[uid]
    assert [problem for panel in panels(board) for problem in lacks(panel, runbooks)] == []
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in board["panels"]}) == len(titles)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"description": ""}, "no description"),
        ({"fieldConfig": {"defaults": {}}}, "no unit"),
        ({"targets": []}, "no questions"),
        ({"datasource": {"uid": "prometheus"}}, "not from the chosen data source"),
        ({"links": [{"url": f"{slo.RUNBOOKS}/Gone.md"}]}, "no such runbook"),
    ],
)
def test_a_panel_that_lacks_something_is_found(change: Document, problem: str) -> None:
    whole = panels(BOARDS["serve-app-llm"])[0]
    (found,) = lacks({**whole, **change}, {path.name for path in RUNBOOKS})
    assert problem in found


@pytest.mark.parametrize("uid", BOARDS)
def test_panels_fill_the_grid_and_none_lies_on_another(uid: str) -> None:
    taken = set[tuple[int, int]]()
    for panel in BOARDS[uid]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS, panel["title"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
    assert len(taken) == COLUMNS * len({y for _, y in taken}), "a line is not full"


def test_the_reader_chooses_what_the_questions_ask_for() -> None:
    for uid, board in BOARDS.items():
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        asked = {name for question in questions() if question.board == uid for name in names(question.expression)}
        assert asked == variables.keys() - {"datasource"}, uid
        assert variables.pop("datasource")["query"] == "prometheus"
        for variable in variables.values():
            assert variable["multi"]
            assert variable["includeAll"]
            assert variable["allValue"] == ".*"
            assert variable["datasource"]["uid"] == "${datasource}"


def names(expression: str) -> set[str]:
    return {name for name in re.findall(r"\$(\w+)", expression) if not name.startswith("__")}


def test_what_an_alert_links_to_is_there() -> None:
    for rule in RULES:
        if "alert" not in rule:
            continue
        url = rule["annotations"]["dashboard_url"]
        uid, _, query = url.removeprefix(f"{slo.DASHBOARDS}/").partition("?")
        variables = {variable["name"] for variable in BOARDS[uid]["templating"]["list"]}
        given = re.findall(r"var-(\w+)=\{\{ \$labels\.(\w+) \}\}", query)
        assert bool(given) == bool(query), url
        for variable, label in given:
            assert variable in variables, url
            assert variable == label or (variable == "node" and label in ("instance", "NodeAddress"))


def test_rates_look_back_as_far_as_the_picture_needs() -> None:
    for question in questions():
        for function, window in re.findall(r"\b(i?rate|increase|delta)\([^\[]*\[([^\]]*)\]", question.expression):
            allowed = {"$__rate_interval", *(FIXED if function == "increase" else ())}
            assert window in allowed, question
        assert "irate(" not in question.expression


def test_quantiles_are_of_rates_by_bucket() -> None:
    for question in questions():
        found = re.findall(r"histogram_quantile\([\d.]+, sum by \(le", question.expression)
        assert len(found) == question.expression.count("histogram_quantile"), question


def test_no_question_trusts_what_ray_makes_up() -> None:
    """The sums of its histograms are guesses, and its bytes of GPU memory are MiB."""
    for question in questions():
        assert not re.search(r"\bray_\w+_sum\b", question.expression), question
        if "_gram_" in question.expression:
            assert "1048576" in question.expression, question


def test_no_question_depends_on_a_jobs_name() -> None:
    assert [question for question in questions() if re.search(r"\bjob *(=|!)", question.expression)] == []


def test_every_metric_of_a_panel_is_exported_by_somebody() -> None:
    known = exported() | RECORDED | {"up", "ALERTS"}
    unknown = {name for name in used() - known if not name.startswith(OTHERS) and not name.startswith("node_")}
    assert unknown == set()


def test_every_exported_metric_is_looked_at_or_is_not_on_purpose() -> None:
    told = {family(name) for name in exported()} | {one.name for one in GenAiSeries("r").families()}
    looked_at = {family(name) for name in used()}
    assert told - looked_at == UNUSED.keys()
    assert not looked_at & UNUSED.keys()


def test_thresholds_are_the_rules() -> None:
    assert promql.bound("ErrorRateVeryHigh") == 0.1
    assert promql.bound("TimeToFirstTokenHigh") == 2
    assert promql.bound("RequestsTurnedAway") == 0.01
    assert promql.bound("ThroughputLow") == 10
    assert promql.objective("tpot") == 0.05
    assert promql.bucket("ScaleFromZeroSlow") == 60
    (ttft,) = (panel for panel in panels(BOARDS["serve-app-llm"]) if panel["title"] == "TTFT")
    steps = ttft["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert steps == [
        {"color": "green", "value": None},
        {"color": "yellow", "value": 2},
        {"color": "red", "value": 5},
    ]
    (left,) = (panel for panel in panels(BOARDS["serve-app-slo"]) if panel["title"] == "TTFT: budget left")
    steps = left["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [step["color"] for step in steps] == ["red", "yellow", "green"]
    assert [step["value"] for step in steps] == [None, 0, 0.25]


def test_every_objective_has_its_row() -> None:
    titles = {panel["title"] for panel in BOARDS["serve-app-slo"]["panels"]}
    for one in slo.SLOS:
        assert {f"{one.name}: budget left", f"{one.name}: burn rate", f"{one.name}: requests"} <= titles
    assert objectives.FACTORS == (1, 3, 6, 14.4)


@pytest.mark.system
def test_prometheus_takes_the_questions(tmp_path: Path) -> None:
    asked = sorted({filled(question.expression) for question in questions()})
    assert len(asked) > 150
    rules = [{"record": f"question:{number}", "expr": text} for number, text in enumerate(asked)]
    path = tmp_path / "questions.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    promtool("check", "rules", path)


def test_kubernetes_has_every_rule() -> None:
    manifest = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert [rule for group in manifest["spec"]["groups"] for rule in group["rules"]] == RULES


def test_kubernetes_scrapes_what_the_rules_know_by_name() -> None:
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


def test_containers_listen_on_loopback_with_images_of_one_version() -> None:
    services: dict[str, Any] = compose()["services"]
    assert services.keys() == {"prometheus", "alertmanager", "grafana", "jaeger"}
    for name, service in services.items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert service["ports"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service.keys() & {"privileged", "network_mode", "env_file"} == set()
        assert service["cap_drop"] == ["ALL"]


def test_no_container_comes_with_a_password() -> None:
    document = compose()
    for service in document["services"].values():
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or (key.endswith("__FILE") and value.startswith("/run/secrets/")), key
    assert document["secrets"] == {"grafana_password": {"file": "./secrets/grafana_password"}}
    ignored = (MONITORING.parents[1] / ".gitignore").read_text().splitlines()
    assert "/cluster/monitoring/secrets/" in ignored


# Made by whoever starts the containers, as README.md says, or beside the service.
MADE = {"./data", "./secrets", "./alertmanager"}


def test_what_is_mounted_is_there() -> None:
    for name, service in compose()["services"].items():
        for volume in service.get("volumes", ()):
            source = volume["source"] if isinstance(volume, dict) else volume.partition(":")[0]
            if source.startswith(("./", "../")) and not source.startswith(tuple(MADE)):
                assert (MONITORING / source).exists(), f"{name}: {source}"
            else:
                assert source.startswith((*MADE, "/tmp/ray")), f"{name}: {source}"
    told = (MONITORING / "README.md").read_text()
    assert all(f"data/{name}" in told for name in ("prometheus", "alertmanager", "grafana"))


def test_what_render_writes_is_what_is_mounted(tmp_path: Path) -> None:
    """As README.md says it, in a folder of the repository's shape."""
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
