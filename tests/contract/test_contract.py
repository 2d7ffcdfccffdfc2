"""The whole service, with a tiny model in its real engine, against its own OpenAPI document, by schemathesis."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from serve_app.api.openapi import OPERATIONS
from tests.graph.house import Config, Service, model
from tests.models import tiny

CASES = 500
AT_A_TIME = 4
CONFIG = Path(__file__).with_name("schemathesis.toml")
IDS = [operation.id for operation in OPERATIONS]
LONGEST = "post_v1_chat_completions"
Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With everything switched on, and a short context, so that the longest answer takes a moment."""
    source = tiny.save("llama", tmp_path_factory.mktemp("model"), tiny.FUSED)
    engine: Config = {"max_context": 48, "max_running": 32}
    everything: Config = {"embeddings": True, "chat_template": "builtin:chatml_tools", "quantization": "int8"}
    with Service([model("small", str(source), engine=engine, **everything)], fused=True) as service:
        service.wait_for("answers on")
        yield service


@pytest.fixture(scope="module")
def runs(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """A process for each operation, some at a time: in threads, Python 3.11's parser fails under hypothesis."""

    def run(id: str) -> Run:
        options = ["--include-operation-id", id, "--max-examples", str(CASES), "--seed", "7", "--checks", "all"]
        patience = ["--continue-on-failure", "--request-timeout", "60", "--max-response-time", "60"]
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
        return subprocess.run(
            [*command, *options, *patience, f"{service.url}/openapi.json"],
            cwd=tmp_path_factory.mktemp(id),
            env=service.environment,
            capture_output=True,
            text=True,
        )

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        # The longest first, or it would be the last alone.
        yield {name: pool.submit(run, name) for name in sorted(IDS, key=lambda name: name != LONGEST)}


@pytest.mark.system
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("id", IDS)
def test_the_service_does_what_its_document_says(runs: dict[str, Future[Run]], id: str) -> None:
    run = runs[id].result()
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
