"""The alert rules are valid, tested in four ways, have a runbook, and use metrics that exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from prometheus_client.metrics_core import Metric

from alerts import slo
from alerts.__main__ import main
from serve_app import errors
from serve_app.core.http import HttpCall
from serve_app.core.queries import ModelState
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.protocol import StepStats
from serve_app.telemetry.meter import IngressMetrics
from serve_app.telemetry.metrics import (
    FINISHED,
    TPOT_OBJECTIVE_S,
    TTFT_OBJECTIVE_S,
    EngineMetrics,
    StepSeries,
    ages,
    gpu,
    metrics_complete,
    states,
)

ALERTS = Path(slo.__file__).parent
RULE_FILES = sorted(ALERTS.glob("rules/*.yml"))
TEST_FILES = sorted(ALERTS.glob("tests/*.yml"))
SLO_TEST_FILES = sorted(ALERTS.glob("tests/slo*.yml"))
RUNBOOKS = sorted(ALERTS.glob("runbooks/*.md"))

Document = dict[str, Any]
RULES: list[Document] = [
    rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
]
BY_NAME: dict[str, Document] = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
GROUPS: dict[str, list[Document]] = {}
for _path in TEST_FILES:
    _document = yaml.safe_load(_path.read_text())
    for _group in _document["tests"]:
        GROUPS.setdefault(_group["name"], []).append({**_group, "tick": _document["evaluation_interval"]})

# The alerts that page.
PAGES = {
    "AlertmanagerUnreachable",
    "AvailabilityBudgetBurnsFast",
    "DeploymentWithoutReplica",
    "EngineStalled",
    "ErrorRateVeryHigh",
    "GPUMemoryNearlyFull",
    "NoReadyReplicas",
    "NotificationsFail",
    "ServiceDown",
    "StreamCompletenessBudgetBurnsFast",
    "TTFTBudgetBurnsFast",
    "TimeToFirstTokenVeryHigh",
}
# Alerts without a person as receiver.
INTERNAL = {"Watchdog"}
DASHBOARDS = {"serve-app-alerting", "serve-app-llm", "serve-app-resources", "serve-app-slo"}

# Metrics of Prometheus, Alertmanager 0.25 and node_exporter.
STANDARD = {
    "ALERTS",
    "up",
    "alertmanager_config_last_reload_successful",
    "alertmanager_notifications_failed_total",
    "alertmanager_notifications_total",
    "node_filesystem_avail_bytes",
    "node_filesystem_size_bytes",
    "prometheus_config_last_reload_successful",
    "prometheus_notifications_alertmanagers_discovered",
    "prometheus_rule_evaluation_failures_total",
}
# Metrics of Ray, and the file of its package that contains the name as a literal, without `ray_`.
RAY = {
    "ray_node_disk_free": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_disk_usage": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gram_available": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gram_used": "dashboard/modules/reporter/reporter_agent.py",
    # Ray defines it in C++. Ray's dashboard queries it under this name.
    "ray_resources": "dashboard/modules/metrics/dashboards/default_dashboard_panels.py",
    "ray_serve_autoscaling_desired_replicas": "serve/_private/autoscaling_state.py",
    "ray_serve_deployment_replica_healthy": "serve/_private/deployment_state.py",
    "ray_serve_deployment_status": "serve/_private/deployment_state.py",
}


def promtool(*arguments: str | Path) -> str:
    """Run promtool and return its output. Fails if promtool reports an error."""
    binary = shutil.which("promtool")
    if binary is None:
        pytest.fail("promtool is not installed; run apt-get install -y prometheus")
    done = subprocess.run([binary, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def families() -> list[Metric]:
    """All metric families of a service with one replica, one HTTP call and one experiment."""
    ingress = IngressMetrics("r1", ["m"], opentelemetry=False)
    ingress.experiments.configure({"e": ["control", "b"]})
    ingress.experiments.set_state("e", {"control": 0.9, "b": 0.1}, stopped=False)
    ingress.http.ended(HttpCall("/generate", "POST", 200, 0.1, 10, 20))
    ingress.queues.of_model("m").started("t", 0.1)
    stats = StepStats(**dict.fromkeys((field.name for field in dataclasses.fields(StepStats)), 1))
    facts = {"kind": "toy", "quantization": "none", "step_age": lambda: 0.0}
    engine = cast(NativeEngine, SimpleNamespace(stats=lambda: stats, **facts))
    of_all = [*states([("m", ModelState.READY, 1)]), *ages([("m", "r1", 0.5)]), metrics_complete(True)]
    graphics = gpu()
    for family in graphics.values():
        family.add_metric(["m", "r1", "n", "g"], 1)
    replica = [*EngineMetrics("m", "r1", engine, {"loading": 1.0}).families(), *StepSeries("m", "r1").families()]
    return [*ingress.families(0.0), *replica, *graphics.values(), *of_all]


def bounds() -> dict[str, set[str]]:
    """The bucket bounds of every histogram in the format of Prometheus."""
    found: dict[str, set[str]] = {}
    for family in families():
        for sample in family.samples:
            if "le" in sample.labels:
                found.setdefault(sample.name, set()).add(sample.labels["le"])
    return found


def exported() -> set[str]:
    return {sample.name for family in families() for sample in family.samples}


def metrics_in(expression: str) -> set[str]:
    """The metric names in PromQL: words that are not a function, label, duration or keyword."""
    rest = re.sub(r'\{[^}]*\}|"[^"]*"|\[[^]]*\]', " ", expression)
    rest = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", " ", rest)
    words: list[str] = re.findall(r"(?<![\w:.])[A-Za-z_][\w:]*(?!\w|:|\s*\()", rest)
    return set(words) - {"and", "offset", "or", "unless"}


def problems(rule: Document, runbooks: set[str]) -> Iterator[str]:
    """The missing parts of an alert."""
    name, labels, annotations = rule["alert"], rule.get("labels", {}), rule.get("annotations", {})
    severities = {"none"} if name in INTERNAL else {"critical", "warning", "info"}
    if labels.get("severity") not in severities:
        yield f"{name}: severity is one of {', '.join(sorted(severities))}"
    if not labels.get("symptom"):
        yield f"{name}: no symptom, which Alertmanager needs for inhibition"
    if not annotations.get("summary"):
        yield f"{name}: no summary"
    if "{{ $value" not in annotations.get("description", ""):
        yield f"{name}: the description does not contain the value"
    base, _, file = annotations.get("runbook_url", "").rpartition("/")
    if base != slo.RUNBOOKS_URL or file not in runbooks:
        yield f"{name}: no runbook"
    dashboard = re.match(r"http://localhost:3000/d/([\w-]+)", annotations.get("dashboard_url", ""))
    if dashboard is None or dashboard[1] not in DASHBOARDS:
        yield f"{name}: no dashboard"


def seconds(duration: str) -> int:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def expectations(group: Document, alert: str) -> dict[int, bool]:
    """Whether the alert is expected to fire, by evaluation time in seconds."""
    tests = [test for test in group["alert_rule_test"] if test["alertname"] == alert]
    return {seconds(test["eval_time"]): bool(test["exp_alerts"]) for test in tests}


@pytest.mark.slow
@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.name)
def test_prometheus_accepts_the_rules(path: Path) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", path)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted({*TEST_FILES} - {*SLO_TEST_FILES}), ids=lambda path: path.name)
def test_alerts_fire_at_the_expected_times_only(path: Path) -> None:
    promtool("test", "rules", path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", slo.SLOS, ids=lambda one: one.slug)
@pytest.mark.parametrize("path", SLO_TEST_FILES, ids=lambda path: path.name)
def test_alerts_of_an_objective_fire_at_the_expected_times_only(tmp_path: Path, path: Path, objective: slo.Slo) -> None:
    """With the rules of one objective, because promtool evaluates all loaded rules for each test."""
    rules = yaml.safe_load(slo.FILE.read_text())
    (group,) = (one for one in rules["groups"] if one["name"] == f"slo-{objective.slug}")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    document = yaml.safe_load(path.read_text())
    tests = [one for one in document["tests"] if objectives(one) == {objective.name}]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({**document, "rule_files": ["rules.yml"], "tests": tests}))
    promtool("test", "rules", tmp_path / "tests.yml")


def objectives(test: Document) -> set[str]:
    """The objectives whose alerts a rule test names."""
    return set(re.findall(r"\b([A-Za-z]+)(?:BudgetBurns|DataMissing)", yaml.safe_dump(test)))


@pytest.mark.parametrize("path", SLO_TEST_FILES, ids=lambda path: path.name)
def test_every_test_of_the_objectives_names_one_of_them(path: Path) -> None:
    names = [objectives(one) for one in yaml.safe_load(path.read_text())["tests"]]
    assert all(len(one) == 1 for one in names)
    assert set[str]().union(*names) == {one.name for one in slo.SLOS}


@pytest.mark.parametrize("alert", sorted(BY_NAME.keys() - {"Watchdog"}))
def test_every_alert_is_tested_four_ways(alert: str) -> None:
    """It fires at the expected time, not one evaluation earlier, not for a healthy service, and is tested without
    data."""
    for group in GROUPS[f"{alert} fires"]:
        expected = expectations(group, alert)
        (first,) = (at for at, fires in expected.items() if fires)
        assert expected.get(first - seconds(group["tick"])) is False
    for group in GROUPS[f"{alert} healthy"]:
        assert group["input_series"]
        assert set(expectations(group, alert).values()) == {False}
    (group,) = GROUPS[f"{alert} without data"]
    assert expectations(group, alert)
    there = {name for series in group["input_series"] for name in metrics_in(series["series"])}
    assert used(alert) == {"up"} or used(alert) - there, "all metrics of the alert have data"


def used(alert: str) -> set[str]:
    """The metrics of an alert and of its recording rules."""
    sources = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
    found, pending = set[str](), metrics_in(BY_NAME[alert]["expr"])
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending |= metrics_in(sources.get(name, ""))
    return found - RECORDED


def test_the_watchdog_always_fires() -> None:
    """It fires from the first evaluation on, with data and without."""
    assert expectations(GROUPS["Watchdog fires"][0], "Watchdog") == {0: True, 1800: True}
    assert expectations(GROUPS["Watchdog without data"][0], "Watchdog") == {1800: True}


def test_all_tested_alerts_exist() -> None:
    named = {
        test["alertname"] for groups in GROUPS.values() for one in groups for test in one.get("alert_rule_test", ())
    }
    assert named == BY_NAME.keys()


def test_every_alert_is_complete() -> None:
    runbooks = {path.name for path in RUNBOOKS}
    assert [problem for rule in BY_NAME.values() for problem in problems(rule, runbooks)] == []
    assert len(BY_NAME) == sum("alert" in rule for rule in RULES), "a name is used twice"


@pytest.mark.parametrize(
    ("part", "key", "problem"),
    [
        ("annotations", "runbook_url", "no runbook"),
        ("annotations", "dashboard_url", "no dashboard"),
        ("annotations", "summary", "no summary"),
        ("annotations", "description", "does not contain the value"),
        ("labels", "severity", "severity is one of"),
        ("labels", "symptom", "no symptom"),
    ],
)
def test_an_incomplete_alert_is_found(part: str, key: str, problem: str) -> None:
    rule = BY_NAME["EngineStalled"]
    mutant = {**rule, part: {name: text for name, text in rule[part].items() if name != key}}
    (found,) = problems(mutant, {path.name for path in RUNBOOKS})
    assert problem in found


def test_an_alert_with_a_deleted_runbook_is_found() -> None:
    (found,) = problems(BY_NAME["EngineStalled"], {"ServiceDown.md"})
    assert found == "EngineStalled: no runbook"


def test_only_the_listed_alerts_page() -> None:
    assert {name for name, rule in BY_NAME.items() if rule["labels"]["severity"] == "critical"} == PAGES


def test_every_metric_of_a_rule_is_exported() -> None:
    known = exported() | STANDARD | RAY.keys() | RECORDED
    unknown = {name for rule in RULES for name in metrics_in(rule["expr"])} - known
    assert unknown == set()


def test_an_unknown_metric_is_found() -> None:
    expression = 'sum by (model) (rate(serve_app_nothing_total{outcome=~"a|b"}[5m])) > 0.1 and on (model) up == 0'
    assert metrics_in(expression) == {"serve_app_nothing_total", "up"}
    assert "serve_app_nothing_total" not in exported()


@pytest.mark.parametrize(("name", "file"), RAY.items())
def test_the_installed_ray_has_the_metric(name: str, file: str) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / file).read_text()
    assert re.search(rf'"{name.removeprefix("ray_")}"|\b{name}\b', source)


def test_thresholds_are_bucket_bounds() -> None:
    """Prometheus counts exactly at a bucket bound and interpolates between two bounds."""
    known, seen = bounds(), set[str]()
    for rule in RULES:
        for name, bound in re.findall(r'(\w+_bucket)\{le="([^"]*)"\}', rule["expr"]):
            assert bound in known[name], rule
            seen.add(name)
        for name, bound in re.findall(r"serve_app:(\w+):p95_5m > (\S+)", rule["expr"]):
            assert f"{float(bound)}" in known[f"serve_app_{name}_bucket"], rule
            seen.add(name)
    assert str(TTFT_OBJECTIVE_S) in known["serve_app_time_to_first_token_seconds_bucket"]
    assert str(TPOT_OBJECTIVE_S) in known["serve_app_time_per_output_token_seconds_bucket"]
    assert len(seen) == 5  # TTFT, TPOT, queue time, start from zero, and the percentile of TTFT


def test_every_outcome_is_classified() -> None:
    kinds = errors.ServeAppError.__subclasses__()
    limits = {"rate_limit_exceeded", "insufficient_quota"}  # the service keeps them, as the operator wants
    failures = {kind.code for kind in kinds if kind.status >= 500 or kind.status == 429} - limits
    assert set(slo.BAD.split("|")) == failures
    # These errors occur before there is a request to a model.
    before = {"body_too_large", "method_not_allowed", "model_not_found", "not_found", "previous_response_not_found"}
    before |= {"request_timeout", "unsupported_encoding", "invalid_api_key", "permission_denied"}
    before |= {"idempotency_key_reused"}
    assert set(slo.NOT_COUNTED.split("|")) == {kind.code for kind in kinds} - failures - before | {"cancelled"}
    assert not FINISHED & {*slo.BAD.split("|"), *slo.NOT_COUNTED.split("|")}
    symptoms = (ALERTS / "rules/symptoms.yml").read_text()
    assert f'outcome=~"{slo.BAD}"' in symptoms
    assert f'outcome!~"{slo.NOT_COUNTED}"' in symptoms


def test_the_rules_of_the_objectives_are_generated() -> None:
    assert slo.FILE.read_text() == slo.text(), "run: python -m alerts rules"


def test_the_command_writes_the_rules(tmp_path: Path) -> None:
    assert main(["rules", "--output", str(tmp_path / "slo.yml")]) == 0
    assert (tmp_path / "slo.yml").read_text() == slo.text()


@pytest.mark.slow
def test_prometheus_accepts_the_queries_of_the_runbooks(tmp_path: Path) -> None:
    blocks = [block for path in RUNBOOKS for block in re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL)]
    queries = {line for block in blocks for line in block.splitlines() if not line.startswith("#")}
    assert len(queries) > 40
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(sorted(queries))]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    promtool("check", "rules", path)


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_is_complete_and_uses_metrics_that_exist(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Meaning",
        "Impact",
        "Diagnosis",
        "Mitigation",
        "How it was tested",
    ]
    urls = [rule["annotations"]["runbook_url"] for rule in BY_NAME.values()]
    assert any(url.endswith(f"/{path.name}") for url in urls), "no alert links to this runbook"
    families_ = {re.sub("_(bucket|count|sum)$", "", name) for name in exported()}
    names = {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"\bserve_app_[a-z_]+\b", text)}
    assert names <= families_ | exported(), names
    assert set(re.findall(r"\bray_[a-z_]+\b", text)) <= RAY.keys()
    # The first lines name all alerts of the runbook.
    mine = {name for name, rule in BY_NAME.items() if rule["annotations"]["runbook_url"].endswith(f"/{path.name}")}
    assert all(f"`{name}`" in text.split("## Meaning")[0] for name in mine)
