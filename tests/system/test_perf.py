"""The load tests against the service with the shipped configuration."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.exits import Exit
from perf.results import Run
from tests.system.service import ShippedService


@pytest.mark.long
@pytest.mark.system
@pytest.mark.perf
def test_a_quick_run_takes_at_most_60_s_and_counts_as_the_server(service: ShippedService, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perf.suite", "--quick", "--url", service.url, "--output", str(tmp_path)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    took = time.monotonic() - began
    print(done.stdout)
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    assert took <= 60
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path)) * 5
    run = Run.read(tmp_path / "results.json")
    assert {stage.scenario for stage in run.stages} == {"single", "batch", "streaming", "concurrency"}
    assert all(stage.finished == stage.requests > 0 for stage in run.stages)
    assert all(one.difference == 0 and one.client for one in run.tokens), run.tokens
    assert run.target.server == "serve_app"
    assert run.target.fixed_length
    assert "counted the same" in done.stdout


@pytest.mark.system
@pytest.mark.perf
@pytest.mark.parametrize("api", ["openai", pytest.param("tgi", marks=pytest.mark.long)])
def test_the_other_apis_can_be_measured(service: ShippedService, api: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perf.suite", "--url", service.url, "--api", api, "--output", str(tmp_path)]
    line = ["--only", "streaming,concurrency", "--concurrency", "2", "4", "--num-requests", "4", "--max-tokens", "8"]
    done = subprocess.run([*command, *line], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    run = Run.read(tmp_path / "results.json")
    assert all(one.difference == 0 and one.client for one in run.tokens)
    assert run.target.quantization in ("none", "int8")  # as the service has chosen for this processor
