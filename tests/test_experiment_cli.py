"""`python -m serve_app experiments`: prints reports as a table or JSON, and checks files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from serve_app import cli
from serve_app.core.experiments import Reports
from serve_app.experiment_config import parse_experiments
from serve_app.gateway.experiment_report import report
from serve_app.gateway.statistics import ExperimentStatistics
from tests.configs import SHIPPED
from tests.gateway.test_experiments import NOW, document, measured
from tests.test_serve_file import with_experiment


@contextmanager
def served(status: int, body: bytes) -> Iterator[str]:
    """The address of a server that answers every GET alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def body(statistics: ExperimentStatistics, error: str = "") -> bytes:
    experiment = parse_experiments(document(percent=30)).experiments[0]
    return json.dumps(asdict(Reports((report(experiment, statistics, "", NOW),), error))).encode()


def test_the_table_has_every_metric_with_its_interval_and_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy cannot reach the loopback interface
    with served(200, body(measured(control=[(0.1, 200)], b=[(0.3, 200)]))) as url:
        assert cli.main(["experiments", "report", "--url", url + "/"]) == 0
    first, verdict, confidence, _, header, *rows = capsys.readouterr().out.rstrip().splitlines()
    assert first == "chat (revision 1), by user, since 1970-01-01T00:00:01+00:00"
    assert verdict.startswith("verdict: b: ttft is worse; b: tpot is worse")
    assert confidence == "intervals hold together at all times with 95% confidence"
    assert re.split(" {2,}", header) == ["metric", "control (70 %)", "b (30 %)", "b - control"]
    titles = [row.split("  ")[0] for row in rows]
    assert titles == [
        *("requests", "TTFT mean ms", "TTFT p95 ms", "TPOT mean ms", "answer length tokens", "failed %"),
        "feedback score",
    ]
    assert rows[1].endswith("+200 [200, 200]: worse")
    assert rows[5].endswith(": no difference seen yet")
    assert rows[6].split() == ["feedback", "score", "-", "-", "-:", "not", "enough", "data", "yet"]


def test_json_is_what_the_service_sends(capsys: pytest.CaptureFixture[str]) -> None:
    sent = body(measured(control=[(0.1, 2)]), "user_config: wrong")
    with served(200, sent) as url:
        assert cli.main(["experiments", "report", "--url", url, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(sent)
        assert cli.main(["experiments", "report", "--url", url]) == 0
    assert (
        "The latest configuration was refused, the earlier one applies. user_config: wrong" in capsys.readouterr().out
    )


def test_a_service_without_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    with served(200, b'{"experiments": [], "error": ""}') as url:
        assert cli.main(["experiments", "report", "--url", url]) == 0
    assert capsys.readouterr().out == "The service has no experiments.\n"


@pytest.mark.parametrize(("status", "content"), [(404, b"{}"), (200, b"<html>")])
def test_an_address_that_is_no_service_is_an_error(
    capsys: pytest.CaptureFixture[str], status: int, content: bytes
) -> None:
    with served(status, content) as url:
        assert cli.main(["experiments", "report", "--url", url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"serve_app: {url}/experiments gave no report: ")
    assert cli.main(["experiments", "report", "--url", url]) == 1, "nothing listens there any more"


def test_check_reads_the_file_and_its_experiments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["experiments", "check", "--config", str(SHIPPED)]) == 0
    assert capsys.readouterr().out == f"{SHIPPED}: valid; experiments: none\n"
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump(with_experiment()))
    assert cli.main(["experiments", "check", "--config", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: valid; experiments: chat\n"
    path.write_text(yaml.safe_dump(with_experiment(model="none")))
    assert cli.main(["experiments", "check", "--config", str(path)]) == 1
    assert "there is no model none" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["stop"], ["report", "--format", "xml"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["experiments", *arguments])
    assert ended.value.code == 2
