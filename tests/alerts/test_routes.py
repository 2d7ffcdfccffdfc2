"""The receivers of alerts by labels, as determined by amtool for the rendered configuration."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from alerts import render
from alerts.settings import EXAMPLE, load
from tests.alerts.receivers import executable, production_settings, write_settings

pytestmark = pytest.mark.slow

TABLE = [
    # The dead man's switch only, whatever the other labels are.
    ("alertname=Watchdog severity=none symptom=monitoring", "dead-man"),
    ("alertname=Watchdog", "dead-man"),
    ("alertname=Watchdog severity=critical", "dead-man"),
    ("alertname=Watchdog severity=none cluster=a", "dead-man"),
    # For inhibition only.
    ("alertname=InfoInhibitor severity=none model=smollm2-135m", "none"),
    # Pages.
    ("alertname=ServiceDown severity=critical symptom=availability", "history,critical"),
    ("alertname=ServiceDown severity=critical job=serve_app instance=127.0.0.1:8000", "history,critical"),
    ("alertname=ErrorRateVeryHigh severity=critical model=smollm2-135m", "history,critical"),
    ("alertname=GPUMemoryNearlyFull severity=critical node=n1 gpu=0", "history,critical"),
    ("alertname=TimeToFirstTokenVeryHigh severity=critical model=smollm2-135m", "history,critical"),
    ("alertname=EngineStalled severity=critical model=smollm2-135m replica=r1", "history,critical"),
    ("alertname=AvailabilityBudgetBurnsFast severity=critical symptom=availability", "history,critical"),
    ("alertname=NotificationsFail severity=critical symptom=monitoring integration=email", "history,critical"),
    # Warnings, in business hours.
    ("alertname=ErrorRateHigh severity=warning model=smollm2-135m", "history,warning"),
    ("alertname=GPUUtilizationHigh severity=warning node=n1 gpu=0", "history,warning"),
    ("alertname=TimeToFirstTokenHigh severity=warning symptom=ttft", "history,warning"),
    ("alertname=ThroughputLow severity=warning", "history,warning"),
    ("alertname=QueueLong severity=warning symptom=capacity", "history,warning"),
    ("alertname=ReplicasFlap severity=warning deployment=smollm2-135m", "history,warning"),
    ("alertname=TTFTBudgetBurnsSlow severity=warning symptom=ttft", "history,warning"),
    ("alertname=NodeLost severity=warning symptom=replicas", "history,warning"),
    ("alertname=TestAlert severity=warning service=llm-inference", "history,warning"),
    ("alertname=watchdog severity=warning", "history,warning"),
    # Info alerts.
    ("alertname=KVCacheNearlyFull severity=info model=smollm2-135m", "history,digest"),
    ("alertname=SequencesPreempted severity=info symptom=capacity", "history,digest"),
    ("alertname=SequencesPreempted severity=info model=smollm2-135m cluster=a", "history,digest"),
    # A missing or unknown severity is sent, not dropped.
    ("alertname=Misspelt severity=Critical", "history,unsorted"),
    ("alertname=Misspelt severity=warn", "history,unsorted"),
    ("alertname=Longer severity=criticality", "history,unsorted"),
    ("alertname=Forgotten", "history,unsorted"),
    ("severity=page", "history,unsorted"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routes")
    return render.write(load(write_settings(folder, production_settings())), folder)[0]


def amtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([executable("amtool"), *arguments], capture_output=True, text=True, check=False)


def test_the_table_has_no_duplicates() -> None:
    assert len({labels for labels, _ in TABLE}) == len(TABLE) >= 25


@pytest.mark.parametrize(("labels", "receivers"), TABLE, ids=[labels for labels, _ in TABLE])
def test_labels_have_the_receivers(config: Path, labels: str, receivers: str) -> None:
    done = amtool("config", "routes", "test", f"--config.file={config}", *labels.split())
    assert (done.stdout.strip(), done.returncode) == (receivers, 0), done.stderr


def test_every_alert_has_a_route_for_its_severity(config: Path) -> None:
    for path in (render.PACKAGE / "rules").glob("*.yml"):
        for rule in (rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]):
            if "alert" in rule:
                labels = [f"{name}={value}" for name, value in {"alertname": rule["alert"], **rule["labels"]}.items()]
                done = amtool("config", "routes", "test", f"--config.file={config}", *labels)
                assert "unsorted" not in done.stdout, rule["alert"]


def test_amtool_reports_a_wrong_receiver(config: Path) -> None:
    wrong = ["--verify.receivers=history,critical", "alertname=X", "severity=warning"]
    assert amtool("config", "routes", "test", f"--config.file={config}", *wrong).returncode == 1


@pytest.mark.parametrize("example", [True, False], ids=["example", "ready"])
def test_amtool_accepts_the_configuration(tmp_path: Path, example: bool) -> None:
    settings = load(EXAMPLE if example else write_settings(tmp_path, production_settings()))
    done = amtool("check-config", str(render.write(settings, tmp_path / "out")[0]))
    assert done.returncode == 0, done.stderr
    assert "SUCCESS" in done.stdout
    assert "7 receivers" in done.stdout
