"""`python -m alerts monitor`: that it starts what it says, that it leaves nothing, and what it says when it cannot."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from alerts import prometheus, render
from alerts.__main__ import main
from alerts.programs import ProgramError, check
from alerts.settings import EXAMPLE
from tests.alerts.test_rules import promtool
from tests.alerts.world import ready, secrets, written
from tests.graph.house import Program, free_port

NOWHERE = "http://127.0.0.1:9"


def monitor(folder: Path, *options: str, **environment: str) -> Program:
    """On ports that are free."""
    ports = [word for name in ("prometheus", "alertmanager", "history") for word in (f"--{name}-port", "0")]
    command = ["alerts", "monitor", "--url", NOWHERE, "--data", str(folder / "data"), *ports, *options]
    return Program(command, **environment)


def address(said: str, name: str) -> str:
    """Where `name` answers, as the monitor says."""
    (found,) = re.findall(rf"{name} .*(http://127\.0\.0\.1:\d+)/", said)
    return str(found)


def get(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
        return json.load(answer)


def until(probe: Callable[[], Any], seconds: float) -> Any:
    """The first that is not nothing."""
    end = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("name", prometheus.PLACES)
def test_the_kept_configurations_are_those_of_the_template(name: str) -> None:
    assert (prometheus.KEPT / name).read_text() == prometheus.config(prometheus.PLACES[name]), (
        "run: python -m alerts prometheus"
    )


def test_the_command_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "KEPT", tmp_path)
    assert main(["prometheus"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(prometheus.PLACES)


@pytest.mark.parametrize("name", prometheus.PLACES)
def test_every_job_that_the_rules_know_is_scraped(name: str) -> None:
    document = yaml.safe_load((prometheus.KEPT / name).read_text())
    jobs = {job["job_name"] for job in document["scrape_configs"]}
    kept = {"alert_history"} if prometheus.PLACES[name].history else set()
    assert jobs == {"serve_app", "ray", "prometheus", "alertmanager", *kept}
    texts = "".join(path.read_text() for path in (render.HERE / "rules").glob("*.yml"))
    assert set(re.findall(r'job="(\w+)"', texts)) <= jobs
    assert document["global"] == {"scrape_interval": "15s", "evaluation_interval": "15s"}


@pytest.mark.system
@pytest.mark.parametrize("name", prometheus.PLACES)
def test_prometheus_takes_the_kept_configurations(tmp_path: Path, name: str) -> None:
    text = (prometheus.KEPT / name).read_text()
    # Debian's Prometheus is built without Kubernetes; for it, what stands there instead is the smallest discovery.
    discovery = "kubernetes_sd_configs:\n      - role: pod\n        selectors: [{role: pod, label: ray.io/cluster}]\n"
    assert (discovery in text) == (name == "prometheus-kubernetes.yml")
    (tmp_path / prometheus.CONFIG).write_text(text.replace(discovery, "static_configs: []\n"))
    secrets(tmp_path / "secrets")
    list(prometheus.write_rules(tmp_path, "https://llm.test/runbooks", "https://llm.test/d"))
    said = promtool("check", "config", tmp_path / prometheus.CONFIG)
    assert "5 rule files found" in said


@pytest.mark.system
def test_without_service_and_settings_it_works_and_leaves_nothing(tmp_path: Path) -> None:
    with monitor(tmp_path) as program:
        said = program.wait_for("the service does not answer: ")
        said = program.wait_for("Ray is not found: ")
        assert "nobody is told" in said
        assert f"{program.folder}/ray/prom_metrics_service_discovery.json lists nothing yet" in said
        rules = get(f"{address(said, 'Prometheus')}/api/v1/rules")["data"]["groups"]
        alerts = [rule for group in rules for rule in group["rules"] if rule["type"] == "alerting"]
        assert len(alerts) > 40
        (watchdog,) = (rule for rule in alerts if rule["name"] == "Watchdog")
        runbook = Path(watchdog["annotations"]["runbook_url"].removeprefix("file://"))
        assert runbook.read_text().startswith("# Alerts get through")
        assert all(rule["health"] != "err" for rule in alerts)
        told = get(f"{address(said, 'Prometheus')}/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
        assert [one["url"] for one in told] == [f"{address(said, 'Alertmanager')}/api/v2/alerts"]
        token = (tmp_path / "data/history_token").read_text().strip()
        assert (tmp_path / "data/history_token").stat().st_mode & 0o777 == 0o600
        history = address(said, "History")
        assert get(f"{history}/alerts", Authorization=f"Bearer {token}") == []
        only_here = [process.net_connections("tcp") for process in program.family()]
        listening = {one.laddr.ip for every in only_here for one in every if one.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        assert program.interrupt(signal.SIGTERM) == 0
        assert program.left() == []
        assert program.said().endswith("stopping\n")


class Metrics(BaseHTTPRequestHandler):
    """Whatever is asked for, as Prometheus reads it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"serve_app_ready_replicas 1\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.system
def test_it_notices_who_comes_and_finds_ray(tmp_path: Path) -> None:
    """The service and Ray are there only after it; the service is behind a path."""
    port = free_port()
    with monitor(tmp_path, "--url", f"http://127.0.0.1:{port}/llm/") as program:
        program.wait_for("the service does not answer: ")
        server = ThreadingHTTPServer(("127.0.0.1", port), Metrics)
        Thread(target=server.serve_forever, daemon=True).start()
        (program.folder / "ray").mkdir()
        listed = [{"labels": {"job": "other"}, "targets": [f"127.0.0.1:{port}"]}]
        (program.folder / "ray/prom_metrics_service_discovery.json").write_text(json.dumps(listed))
        try:
            program.wait_for(f"the service is up: http://127.0.0.1:{port}/llm/metrics is scraped")
            said = program.wait_for("Ray is up: scraped")
        finally:
            server.shutdown()
            server.server_close()
        program.wait_for("Ray does not answer: none of the addresses (1)")
        assert said.count("the service is up") == 1, "a state is said once"
        assert program.interrupt() == 0


@pytest.mark.system
def test_alerts_reach_the_history_and_people_by_the_settings_links(tmp_path: Path) -> None:
    secrets(tmp_path / "secrets")
    settings = written(tmp_path, ready())
    with monitor(tmp_path, "--settings", str(settings)) as program:
        said = program.wait_for("Ray is not found")
        assert f"told to whom {settings} names" in said
        rules = get(f"{address(said, 'Prometheus')}/api/v1/rules")["data"]["groups"]
        links = {rule["annotations"]["runbook_url"] for one in rules for rule in one["rules"] if "annotations" in rule}
        assert {link.rpartition("/")[0] for link in links} == {"https://llm.test/runbooks"}
        status = get(f"{address(said, 'Alertmanager')}/api/v2/status")
        config = yaml.safe_load(status["config"]["original"])
        (history,) = (one for one in config["receivers"] if one["name"] == "history")
        assert history["webhook_configs"][0]["url"] == f"{address(said, 'History')}/webhook"
        assert program.interrupt() == 0


@pytest.mark.system
def test_when_it_is_killed_nothing_stays(tmp_path: Path) -> None:
    with monitor(tmp_path) as program:
        program.wait_for("monitoring http")
        assert len(program.family()) == 3
        program.process.kill()
        program.process.wait()
        until(lambda: not program.left(), 10)


@pytest.mark.system
def test_when_one_of_its_programs_ends_so_does_it(tmp_path: Path) -> None:
    with monitor(tmp_path) as program:
        program.wait_for("monitoring http")
        (alertmanager,) = program.find("--cluster.listen-address")
        alertmanager.kill()
        assert program.process.wait(20) == 1
        assert "alertmanager ended with -9; the end of" in program.said()
        assert program.left() == []


@pytest.mark.system
def test_two_with_the_same_folder(tmp_path: Path) -> None:
    with monitor(tmp_path) as first:
        first.wait_for("monitoring http")
        with monitor(tmp_path) as second:
            assert second.process.wait(60) == 2
            assert "another monitor" in second.said()
            assert "--data" in second.said()
        assert first.process.poll() is None
        assert get(f"{address(first.said(), 'Prometheus')}/api/v1/alertmanagers")["status"] == "success"


@pytest.mark.system
@pytest.mark.parametrize("name", ["prometheus", "alertmanager", "history"])
def test_a_port_that_somebody_has(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["monitor", "--data", str(tmp_path), f"--{name}-port", str(port), *free(name)]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    assert f"choose another port with --{name}-port" in said


def free(but: str) -> list[str]:
    return [word for name in {"prometheus", "alertmanager", "history"} - {but} for word in (f"--{name}-port", "0")]


def test_programs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["monitor", "--data", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert "Prometheus and promtool and Alertmanager and amtool are missing" in said
    assert "apt-get install -y prometheus prometheus-alertmanager" in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://h:port", "http://h:99999", "http://h/?a=b", "http://u:p@h"]
)
def test_a_url_that_is_none(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--data", str(tmp_path), "--url", url]) == 2
    assert "write it like http://127.0.0.1:8000" in capsys.readouterr().err


def test_settings_that_would_reach_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--data", str(tmp_path), "--settings", str(EXAMPLE)]) == 2
    said = capsys.readouterr().err
    assert "would reach nobody" in said
    assert "runbooks_url: 'https://git.example.com" in said
    assert main(["monitor", "--data", str(tmp_path), "--settings", str(tmp_path / "no.yml")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["http", "-1", "65536"])
def test_a_port_that_is_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["monitor", "--prometheus-port", port])
    assert ended.value.code == 2
    assert "a port is 1 to 65535, or 0" in capsys.readouterr().err


@pytest.mark.system
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["monitor", "--data", str(tmp_path / "file"), *free("")]) == 2
    assert "give another --data" in capsys.readouterr().err


def test_a_configuration_that_is_refused_says_by_whom() -> None:
    with pytest.raises(ProgramError, match="sh refuses the configuration:\nno good"):
        check(["sh", "-c", "echo no good; exit 1"])
