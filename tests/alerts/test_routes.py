"""Which receivers a set of labels comes to, as amtool says for the rendered configuration."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from alerts import render
from alerts.settings import EXAMPLE, load
from tests.alerts.world import program, ready, written

pytestmark = pytest.mark.system  # needs the system's amtool

TABLE = [
    # The dead-man's switch, and nobody else, whatever else it says.
    ("alertname=Watchdog severity=none", "dead-man"),
    ("alertname=Watchdog", "dead-man"),
    ("alertname=Watchdog severity=critical", "dead-man"),
    ("alertname=Watchdog severity=none cluster=a", "dead-man"),
    # What the guide calls critical.
    ("alertname=ServiceDown severity=critical", "history,critical"),
    ("alertname=ServiceDown severity=critical job=serve_app instance=127.0.0.1:8000", "history,critical"),
    ("alertname=HighErrorRate severity=critical model=smollm2-135m", "history,critical"),
    ("alertname=GPUMemoryNearFull severity=critical gpu=0", "history,critical"),
    ("alertname=HighTTFT severity=critical model=smollm2-135m", "history,critical"),
    ("alertname=NoTokensWhileBusy severity=critical replica=r1", "history,critical"),
    ("alertname=AvailabilityBurn severity=critical slo=availability", "history,critical"),
    ("alertname=PrometheusNotIngesting severity=critical", "history,critical"),
    # What it calls warnings.
    ("alertname=HighErrorRate severity=warning model=smollm2-135m", "history,warning"),
    ("alertname=HighGPUUtilisation severity=warning gpu=0", "history,warning"),
    ("alertname=HighTTFT severity=warning", "history,warning"),
    ("alertname=LowThroughput severity=warning", "history,warning"),
    ("alertname=QueueSaturated severity=warning", "history,warning"),
    ("alertname=ReplicaFlapping severity=warning deployment=smollm2-135m", "history,warning"),
    ("alertname=TTFTBurn severity=warning slo=ttft", "history,warning"),
    ("alertname=TestAlert severity=warning service=llm-inference", "history,warning"),
    # Only to be known.
    ("alertname=DeployStarted severity=info", "history,digest"),
    ("alertname=IdleGPU severity=info gpu=0", "history,digest"),
    ("alertname=ReplicaScaled severity=info model=smollm2-135m cluster=a", "history,digest"),
    # A severity that nobody knows is told of, not lost.
    ("alertname=Misspelt severity=Critical", "history,unsorted"),
    ("alertname=Misspelt severity=warn", "history,unsorted"),
    ("alertname=Longer severity=criticality", "history,unsorted"),
    ("alertname=Forgotten", "history,unsorted"),
    ("alertname=Other severity=none", "history,unsorted"),
    ("severity=page", "history,unsorted"),
    ("alertname=watchdog severity=warning", "history,warning"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routes")
    return render.write(load(written(folder, ready())), folder)[0]


def amtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("amtool"), *arguments], capture_output=True, text=True, check=False)


def test_the_table_is_long_enough() -> None:
    assert len({labels for labels, _ in TABLE}) == len(TABLE) >= 25


@pytest.mark.parametrize(("labels", "receivers"), TABLE, ids=[labels for labels, _ in TABLE])
def test_labels_come_to(config: Path, labels: str, receivers: str) -> None:
    done = amtool("config", "routes", "test", f"--config.file={config}", *labels.split())
    assert (done.stdout.strip(), done.returncode) == (receivers, 0), done.stderr


def test_amtool_tells_a_wrong_receiver(config: Path) -> None:
    wrong = ["--verify.receivers=history,critical", "alertname=X", "severity=warning"]
    assert amtool("config", "routes", "test", f"--config.file={config}", *wrong).returncode == 1


@pytest.mark.parametrize("example", [True, False], ids=["example", "ready"])
def test_amtool_finds_the_configuration_clean(tmp_path: Path, example: bool) -> None:
    settings = load(EXAMPLE if example else written(tmp_path, ready()))
    done = amtool("check-config", str(render.write(settings, tmp_path / "out")[0]))
    assert done.returncode == 0, done.stderr
    assert "SUCCESS" in done.stdout
    assert "6 receivers" in done.stdout
