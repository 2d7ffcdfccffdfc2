"""What is taken out of HAProxy's configuration, and that the program which does it becomes HAProxy."""

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


def test_only_the_service_listens_and_nothing_is_logged_elsewhere() -> None:
    expected = WRITTEN.replace("    log 127.0.0.1:514 local0 info\n", "")
    for first, after in (("frontend prometheus", "frontend http_frontend"), ("listen stats", None)):
        end = expected.index(after) if after else len(expected)
        expected = expected[: expected.index(first)] + expected[end:]
    expected = expected.replace("    bind *:8000\n", f"    bind *:8000\n    {HEADERS}\n    {STAMP}\n")
    assert haproxy.fenced(WRITTEN, {}) == expected
    assert [line.strip() for line in expected.splitlines() if "bind" in line] == ["bind *:8000"]


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("RAY_SERVE_HAPROXY_METRICS_PORT", "    bind 127.0.0.1:9101"),
        ("RAY_SERVE_HAPROXY_STATS_PORT", "  bind 127.0.0.1:8404"),
        ("RAY_SERVE_HAPROXY_LOG_TARGET", "    log 127.0.0.1:514 local0 info"),
    ],
)
def test_what_a_user_asks_for_is_there_on_loopback(variable: str, line: str) -> None:
    assert line not in haproxy.fenced(WRITTEN, {}).splitlines()
    assert line in haproxy.fenced(WRITTEN, {variable}).splitlines()


def test_the_program_that_ray_is_told_of_fences_the_file_and_becomes_haproxy(tmp_path: Path) -> None:
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
    assert configuration.read_text() == haproxy.fenced(WRITTEN, {})


def test_streams_of_any_length_outlive_a_change_and_files_are_together(tmp_path: Path) -> None:
    variables = haproxy.environment("/bin/true", tmp_path, 600.5)
    assert int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 600.5
    paths = [value for value in variables.values() if value.startswith("/")]
    assert len(paths) == 6
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


def test_a_binary_that_is_not_there_is_no_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere/haproxy")
    assert haproxy.find() is None
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/bin/true")
    assert haproxy.find() == "/bin/true"
