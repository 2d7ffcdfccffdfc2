"""Each client library with an environment of its own: its script, which makes the assertions, against the service."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.graph.service import ROOT

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SCRIPTS = Path(__file__).parent / "scripts"
CHECKS = {"quickstart", "conversation", "stream", "tool_loop", "typed_output", "errors"}
# The environments of the scripts, as the Makefile builds them.
OPENAI_3, OPENAI_2 = ".venv-clients", ".venv-clients-openai2"


def run_script(environment: str, name: str, url: str) -> dict[str, object]:
    """The results of the script's checks by name."""
    interpreter = ROOT / environment / "bin/python"
    assert interpreter.exists(), f"{environment} is missing; `make {environment}/clients.done` builds it"
    return run([str(interpreter), str(SCRIPTS / f"run_{name}.py"), url])


def run(command: list[str]) -> dict[str, object]:
    """The JSON object in the last line of the program's output. Fails with the whole output if the program fails."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    quiet = {
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "TORCH": str(Path(torch.origin).parents[1]),
    }
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **quiet})
    print(ended.stderr)
    assert ended.returncode == 0, ended.stdout
    results = json.loads(ended.stdout.splitlines()[-1])
    assert isinstance(results, dict)
    return results


@pytest.mark.parametrize("name", ["openai_agents", "litellm"])
def test_a_client_of_openai_3(url: str, name: str) -> None:
    assert set(run_script(OPENAI_3, name, url)) == CHECKS


@pytest.mark.long
@pytest.mark.parametrize("name", ["pydantic_ai", "langgraph"])
def test_another_client_of_openai_3(url: str, name: str) -> None:
    assert set(run_script(OPENAI_3, name, url)) == CHECKS


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        *("instructor", "autogen", "haystack", "smolagents", "dspy", "llama_index", "langchain_huggingface"),
        "litellm_proxy",
    ],
)
def test_a_client_of_openai_2(url: str, name: str) -> None:
    assert set(run_script(OPENAI_2, name, url)) == CHECKS


@pytest.mark.long
def test_lm_eval(url: str) -> None:
    checks = {"quickstart", "perplexity", "generation", "conversation", "errors"}
    assert set(run_script(OPENAI_2, "lm_eval", url)) == checks


@pytest.mark.long
def test_guidellm(url: str) -> None:
    assert set(run_script(OPENAI_2, "guidellm", url)) == {"quickstart", "completions", "responses", "errors"}


@pytest.fixture(scope="module")
def npm_scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts for JavaScript, with the packages of package-lock.json beside them."""
    folder = tmp_path_factory.mktemp("npm") / "clients"
    shutil.copytree(SCRIPTS.parent / "npm", folder, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=120)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", ["openai", "anthropic", "ai_sdk"])
def test_a_client_for_javascript(url: str, npm_scripts: Path, name: str) -> None:
    assert set(run(["node", str(npm_scripts / f"{name}.mjs"), url])) == CHECKS
