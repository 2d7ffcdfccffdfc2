"""The whole service, with a tiny model in the native engine, against its own OpenAPI document, by schemathesis."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from serve_app.api.operations import OPERATIONS
from tests.graph.service import Config, Service, model_config
from tests.models import tiny

CONFIG = Path(__file__).with_name("schemathesis.toml")
CASES, LONG_CASES = 15, 500
# Operations with 50 fields and more. Their coverage phase, a case for each value at a bound, is long; tests/api sends
# each of these fields too.
LARGE = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
QUICK = f"""
[[operations]]
include-path = {json.dumps(LARGE)}
phases.coverage.enabled = false
"""
PROCESSES = 4
IDS = [operation.id for operation in OPERATIONS]
SLOWEST = "post_v1_chat_completions"
Run = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Every feature is enabled. The context is short, so that the longest answer takes little time."""
    source = tiny.save("llama", tmp_path_factory.mktemp("model"), tiny.FUSED)
    engine: Config = {"max_context": 48, "max_running": 32}
    features: Config = {"embeddings": True, "chat_template": "builtin:chatml_tools", "quantization": "int8"}
    variants = [{"name": name, "model": "small"} for name in ("control", "candidate")]
    experiments: list[Config] = [{"name": "split", "unit": "request", "variants": variants}]
    with Service(
        [model_config("small", str(source), engine=engine, **features)],
        experiments=experiments,
        sections={"batches": {}},
    ) as service:
        service.wait_until_ready()
        yield service


def schemathesis(service: Service, folder: Path, cases: int, *options: str, config: Path = CONFIG) -> Run:
    """Every check on at most `cases` random requests for each operation, besides the examples and the edge cases."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += ["--max-examples", str(cases), "--seed", "7", "--checks", "all", "--continue-on-failure"]
    command += ["--request-timeout", "60", "--max-response-time", "60", *options, f"{service.url}/openapi.json"]
    return subprocess.run(command, cwd=folder, env=service.environment, capture_output=True, text=True)


def check(run: Run) -> None:
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_the_service_follows_its_document(service: Service, tmp_path: Path) -> None:
    config = tmp_path / "quick.toml"
    config.write_text(CONFIG.read_text() + QUICK)
    check(schemathesis(service, tmp_path, CASES, config=config))


@pytest.fixture(scope="module")
def runs(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """One process for each operation: with several threads in one process, hypothesis makes Python 3.11's parser fail.

    The slowest operation is the first, so that it does not run alone at the end.
    """
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {
            name: pool.submit(
                schemathesis, service, tmp_path_factory.mktemp(name), LONG_CASES, "--include-operation-id", name
            )
            for name in sorted(IDS, key=lambda name: name != SLOWEST)
        }


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("operation", IDS)
def test_the_service_follows_its_document_in_many_cases(runs: dict[str, Future[Run]], operation: str) -> None:
    check(runs[operation].result())
