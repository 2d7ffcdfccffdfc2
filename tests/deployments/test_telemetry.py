"""A process imports and installs only the telemetry that its configuration enables."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from serve_app.config import ConfigError, Telemetry as Settings, Tracing
from serve_app.deployments.telemetry import ProcessTelemetry, check
from tests.api.scripted import ScriptedEngine, ScriptedTelemetry, app_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_opentelemetry_is_not_imported_while_tracing_is_off() -> None:
    program = (
        "import sys\n"
        "from serve_app.config import Telemetry as Settings\n"
        "from serve_app.deployments.telemetry import ProcessTelemetry\n"
        "from tests.api.scripted import ScriptedEngine, ScriptedTelemetry, app_config\n"
        "ProcessTelemetry(Settings(), '', 'r').app(ScriptedEngine(), ScriptedTelemetry(), app_config())\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not any(name.startswith("opentelemetry") for name in done.stdout.split())


@pytest.mark.parametrize(("settings", "count"), [(Settings(), 0), (Settings(tracing=Tracing()), 1)])
def test_the_application_has_the_tracing_middleware_only_if_tracing_is_on(settings: Settings, count: int) -> None:
    telemetry = ProcessTelemetry(settings, "", "r")
    app = telemetry.app(ScriptedEngine(), ScriptedTelemetry(), app_config())
    telemetry.stop()
    assert isinstance(app, Starlette)
    assert [getattr(m.cls, "__name__", "") for m in app.user_middleware].count("Observe") == count


async def test_an_http_call_is_one_json_line(tmp_path: Path) -> None:
    loggers = logging.getLogger("ray.serve"), logging.getLogger("serve_app")
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    path = tmp_path / "ingress.log"
    file = logging.FileHandler(path)
    try:
        for logger in loggers:
            logger.handlers[:] = [file]
            logger.setLevel(logging.INFO)
        telemetry = ProcessTelemetry(Settings(log_format="json"), "", "r")
        app = telemetry.app(ScriptedEngine(), ScriptedTelemetry(), app_config())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.post("/generate", json={"model": "small", "prompt": "hi"})
    finally:
        file.close()
        for logger, (handlers, level) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["method"], line["route"], line["status"]) == ("POST", "/generate", 200)
    assert line["request_id"] == response.headers["x-request-id"]
    assert line["duration_ms"] >= 0
    assert "error" not in line


def test_tracing_without_its_packages_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "serve_app.telemetry.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'serve_app\[tracing\]'"):
        check(Settings(tracing=Tracing()))
    check(Settings())
