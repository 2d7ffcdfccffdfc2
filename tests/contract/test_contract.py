"""The whole service and its real model against its own OpenAPI document, by schemathesis."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.graph.house import Service, model

CASES = 40
CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A short context, so that the longest answer takes a moment."""
    engine = {"max_context": 48, "max_running": 32}
    with Service([model("small", "builtin:smollm2-135m", engine=engine)], fused=True) as service:
        service.wait_for("answers on")
        yield service


@pytest.mark.system
@pytest.mark.timeout(1800)
def test_the_service_does_what_its_document_says(service: Service, tmp_path: Path) -> None:
    options = ["--max-examples", str(CASES), "--workers", "4", "--checks", "all", "--continue-on-failure"]
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", *options]
    run = subprocess.run(
        [*command, f"{service.url}/openapi.json"], cwd=tmp_path, env=service.environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
