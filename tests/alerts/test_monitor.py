"""`python -m alerts monitor`: the programs it starts and stops, its output, and its error messages."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alerts import prometheus, render
from alerts.__main__ import main
from alerts.monitor import ray_file
from alerts.programs import ProgramError, check
from alerts.settings import EXAMPLE
from tests.alerts.receivers import production_settings, write_secrets, write_settings
from tests.alerts.test_rules import promtool
from tests.graph.service import Program

CLOSED = "http://127.0.0.1:9"


def monitor(folder: Path, *options: str, **environment: str) -> Program:
    """The monitor of a closed address, on free ports."""
    ports = [word for name in ("prometheus", "alertmanager", "history") for word in (f"--{name}-port", "0")]
    command = ["alerts", "monitor", "--url", CLOSED, "--data", str(folder / "data"), *ports, *options]
    return Program(command, **environment)


def address(output: str, name: str) -> str:
    """The address of a program in the output of the monitor."""
    (found,) = re.findall(rf"{name} .*(http://127\.0\.0\.1:\d+)/", output)
    return str(found)


def get(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
        return json.load(answer)


def until(probe: Callable[[], Any], seconds: float) -> Any:
    """Wait for the first true value of `probe` and return it."""
    end = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def test_the_command_writes_the_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prometheus", "--output", str(tmp_path / "new")]) == 0
    written = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert written == {name: prometheus.config(targets) for name, targets in prometheus.CONFIGS.items()}
    (tmp_path / "file").touch()
    assert main(["prometheus", "--output", str(tmp_path / "file")]) == 2
    assert "give another folder with --output" in capsys.readouterr().err


@pytest.mark.parametrize("name", prometheus.CONFIGS)
def test_every_job_of_the_rules_is_scraped(name: str) -> None:
    document = yaml.safe_load(prometheus.config(prometheus.CONFIGS[name]))
    jobs = {job["job_name"] for job in document["scrape_configs"]}
    optional = {"alert_history"} if prometheus.CONFIGS[name].history else set()
    assert jobs == {"serve_app", "ray", "prometheus", "alertmanager", *optional}
    texts = "".join(path.read_text() for path in (render.PACKAGE / "rules").glob("*.yml"))
    assert set(re.findall(r'job="(\w+)"', texts)) <= jobs
    assert document["global"] == {"scrape_interval": "15s", "evaluation_interval": "15s"}


@pytest.mark.system
@pytest.mark.parametrize("name", prometheus.CONFIGS)
def test_prometheus_accepts_the_configurations(tmp_path: Path, name: str) -> None:
    text = prometheus.config(prometheus.CONFIGS[name])
    # Debian's Prometheus is built without Kubernetes, so the discovery is replaced by the smallest other one.
    discovery = "kubernetes_sd_configs:\n      - role: pod\n        selectors: [{role: pod, label: ray.io/cluster}]\n"
    assert (discovery in text) == (name == "prometheus-kubernetes.yml")
    (tmp_path / prometheus.CONFIG).write_text(text.replace(discovery, "static_configs: []\n"))
    write_secrets(tmp_path / "secrets")
    list(prometheus.write_rules(tmp_path, "https://llm.test/runbooks", "https://llm.test/d"))
    output = promtool("check", "config", tmp_path / prometheus.CONFIG)
    assert "5 rule files found" in output


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/tmp"),
        ({"TMPDIR": "/a"}, "/a"),
        ({"RAY_TMPDIR": "/b", "TMPDIR": "/a"}, "/b"),
    ],
)
def test_the_file_of_ray_is_in_rays_temporary_folder(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ray_file(None) == Path(folder) / "ray/prom_metrics_service_discovery.json"
    assert ray_file(Path("/c/file.json")) == Path("/c/file.json")


@pytest.mark.system
def test_it_starts_and_stops_everything_without_settings(tmp_path: Path) -> None:
    with monitor(tmp_path) as program:
        output = program.wait_for_output("monitoring http")
        assert "Alerts are only recorded here." in output
        rules = get(f"{address(output, 'Prometheus')}/api/v1/rules")["data"]["groups"]
        alerts = [rule for group in rules for rule in group["rules"] if rule["type"] == "alerting"]
        assert len(alerts) > 40
        (watchdog,) = (rule for rule in alerts if rule["name"] == "Watchdog")
        runbook = Path(watchdog["annotations"]["runbook_url"].removeprefix("file://"))
        assert runbook.read_text().startswith("# Alert delivery works")
        assert all(rule["health"] != "err" for rule in alerts)
        alertmanagers = f"{address(output, 'Prometheus')}/api/v1/alertmanagers"
        active = until(lambda: get(alertmanagers)["data"]["activeAlertmanagers"], 20)
        assert [one["url"] for one in active] == [f"{address(output, 'Alertmanager')}/api/v2/alerts"]
        token = (tmp_path / "data/history_token").read_text().strip()
        assert (tmp_path / "data/history_token").stat().st_mode & 0o777 == 0o600
        history = address(output, "History")
        assert get(f"{history}/alerts", Authorization=f"Bearer {token}") == []
        connections = [process.net_connections("tcp") for process in program.descendants()]
        listening = {one.laddr.ip for every in connections for one in every if one.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        assert program.interrupt(signal.SIGTERM) == 0
        assert program.running() == []
        assert program.output().endswith("stopping\n")


@pytest.mark.system
@pytest.mark.timeout(720)
@pytest.mark.ci
def test_it_reports_when_the_service_and_ray_appear_and_disappear(reported: str) -> None:
    """The environment has a proxy, which is not used for loopback. The story runs in the background (changes.py),
    because Prometheus notices a change after up to 15 s."""
    expected = (
        "the service does not answer: ",
        "Ray is not found: ",
        "the service is up: Prometheus scrapes http://127.0.0.1:",
        "Ray is up: Prometheus scrapes",
        "Ray does not answer at any of the addresses (1)",
    )
    assert [text for text in expected if text not in reported] == []
    assert reported.count("the service is up") == 1, "a state is reported once"


@pytest.mark.system
def test_the_settings_determine_receivers_and_links(tmp_path: Path) -> None:
    write_secrets(tmp_path / "secrets")
    settings = write_settings(tmp_path, production_settings())
    with monitor(tmp_path, "--settings", str(settings)) as program:
        output = program.wait_for_output("monitoring http")
        assert f"Alerts are sent to the receivers in {settings}" in output
        rules = get(f"{address(output, 'Prometheus')}/api/v1/rules")["data"]["groups"]
        links = {rule["annotations"]["runbook_url"] for one in rules for rule in one["rules"] if "annotations" in rule}
        assert {link.rpartition("/")[0] for link in links} == {"https://llm.test/runbooks"}
        status = get(f"{address(output, 'Alertmanager')}/api/v2/status")
        config = yaml.safe_load(status["config"]["original"])
        (history,) = (one for one in config["receivers"] if one["name"] == "history")
        assert history["webhook_configs"][0]["url"] == f"{address(output, 'History')}/webhook"
        assert program.interrupt() == 0


@pytest.mark.system
def test_its_programs_end_when_it_is_killed(tmp_path: Path) -> None:
    with monitor(tmp_path) as program:
        program.wait_for_output("monitoring http")
        assert len(program.descendants()) == 3
        program.process.kill()
        program.process.wait()
        until(lambda: not program.running(), 10)


@pytest.mark.system
def test_it_ends_when_one_of_its_programs_ends(tmp_path: Path) -> None:
    with monitor(tmp_path) as program:
        program.wait_for_output("monitoring http")
        (alertmanager,) = program.find("--cluster.listen-address")
        alertmanager.kill()
        assert program.process.wait(20) == 1
        assert "alertmanager ended with exit code -9. The last lines of" in program.output()
        assert program.running() == []


@pytest.mark.system
def test_two_monitors_with_the_same_folder(tmp_path: Path) -> None:
    with monitor(tmp_path) as first:
        first.wait_for_output("monitoring http")
        with monitor(tmp_path) as second:
            assert second.process.wait(60) == 2
            assert "another monitor" in second.output()
            assert "--data" in second.output()
        assert first.process.poll() is None
        assert get(f"{address(first.output(), 'Prometheus')}/api/v1/alertmanagers")["status"] == "success"


@pytest.mark.system
@pytest.mark.parametrize("name", ["prometheus", "alertmanager", "history"])
def test_a_port_in_use(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["monitor", "--data", str(tmp_path), f"--{name}-port", str(port), *free(name)]) == 2
    output = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in output
    assert f"Choose another port with --{name}-port" in output


def free(but: str) -> list[str]:
    return [word for name in {"prometheus", "alertmanager", "history"} - {but} for word in (f"--{name}-port", "0")]


def test_missing_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["monitor", "--data", str(tmp_path / "data")]) == 2
    output = capsys.readouterr().err
    assert "Prometheus and promtool and Alertmanager and amtool are not installed" in output
    assert "apt-get install -y prometheus prometheus-alertmanager" in output
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://h:port", "http://h:99999", "http://h/?a=b", "http://u:p@h"]
)
def test_an_invalid_url(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--data", str(tmp_path), "--url", url]) == 2
    assert "an example is http://127.0.0.1:8000" in capsys.readouterr().err


def test_incomplete_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--data", str(tmp_path), "--settings", str(EXAMPLE)]) == 2
    output = capsys.readouterr().err
    assert "is incomplete, so no notification would be delivered" in output
    assert "runbooks_url: 'https://git.example.com" in output
    assert main(["monitor", "--data", str(tmp_path), "--settings", str(tmp_path / "no.yml")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["http", "-1", "65536"])
def test_an_invalid_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["monitor", "--prometheus-port", port])
    assert ended.value.code == 2
    assert "a port is a number from 1 to 65535, or 0" in capsys.readouterr().err


@pytest.mark.system
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["monitor", "--data", str(tmp_path / "file"), *free("")]) == 2
    assert "give another folder with --data" in capsys.readouterr().err


def test_a_rejected_configuration_names_the_program() -> None:
    with pytest.raises(ProgramError, match="sh rejects the configuration:\nno good"):
        check(["sh", "-c", "echo no good; exit 1"])
