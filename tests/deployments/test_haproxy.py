"""The HAProxy that Ray Serve starts listens and logs only for the service."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from serve_app.deployments import haproxy

WRITTEN = """global
    # Access/event log at `info`.
    log 127.0.0.1:514 local0 info
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    log global
    retry-on conn-failure
frontend prometheus
    bind :9101
    mode http
    http-request use-service prometheus-exporter if { path /metrics }
frontend http_frontend
    bind *:8000
    use_backend http-serve_app if is_http-serve_app
backend http-serve_app
    log global
    server one 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""
HEADERS = "timeout http-request 10s"
STAMP = "http-request set-header X-Request-Start t=%[date(0,us)]"


def test_only_the_port_of_the_service_stays_and_no_log() -> None:
    expected = WRITTEN.replace("    log 127.0.0.1:514 local0 info\n", "")
    for first, after in (("frontend prometheus", "frontend http_frontend"), ("listen stats", None)):
        end = expected.index(after) if after else len(expected)
        expected = expected[: expected.index(first)] + expected[end:]
    expected = expected.replace("    bind *:8000\n", f"    bind *:8000\n    {HEADERS}\n    {STAMP}\n")
    assert haproxy.restricted(WRITTEN, {"RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure"}) == expected
    assert [line.strip() for line in expected.splitlines() if "bind" in line] == ["bind *:8000"]


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("RAY_SERVE_HAPROXY_METRICS_PORT", "    bind 127.0.0.1:9101"),
        ("RAY_SERVE_HAPROXY_STATS_PORT", "  bind 127.0.0.1:8404"),
        ("RAY_SERVE_HAPROXY_LOG_TARGET", "    log 127.0.0.1:514 local0 info"),
    ],
)
def test_a_part_that_a_user_enables_stays_on_loopback(variable: str, line: str) -> None:
    assert line not in haproxy.restricted(WRITTEN, {}).splitlines()
    assert line in haproxy.restricted(WRITTEN, {variable: "1"}).splitlines()


def test_the_program_that_ray_runs_restricts_the_file_and_replaces_itself_by_haproxy(tmp_path: Path) -> None:
    binary = tmp_path / "a binary"
    binary.write_text('#!/bin/sh\necho "$$" "$@"\n')
    binary.chmod(0o700)
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(WRITTEN)
    variables = haproxy.environment(str(binary), tmp_path, 600)
    command = [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(configuration), "-sf", "1"]
    environment = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.read().split() == [str(process.pid), "-dS", *command[1:]]
    assert configuration.read_text() == haproxy.restricted(WRITTEN, {})


def test_the_longest_stream_survives_a_change_and_all_files_are_in_the_folder(tmp_path: Path) -> None:
    variables = haproxy.environment("/bin/true", tmp_path, 600.5)
    assert int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 600.5
    paths = [value for value in variables.values() if value.startswith("/")]
    assert len(paths) == 6
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


def test_a_configured_binary_that_does_not_exist_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere/haproxy")
    assert haproxy.find() is None
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/bin/true")
    assert haproxy.find() == "/bin/true"
