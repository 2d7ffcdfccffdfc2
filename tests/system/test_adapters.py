"""LoRA adapters of the embedded model, loaded while the whole service runs, by the documented commands."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any

import httpx
import pytest

from serve_app.engines.files.conversion import convert_gguf
from serve_app.engines.files.sources import builtin_gguf
from tests.models.adapters import merged, save_adapter
from tests.models.concurrent_load import GreedyRequest, generated_answers
from tests.system.service import ToolsService, documented_examples

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PROMPT = tuple(range(100, 140))


def test_an_adapter_is_loaded_used_and_unloaded(tools_service: ToolsService) -> None:
    model = convert_gguf(builtin_gguf(), lambda stage: None)
    folder = save_adapter(model, tools_service.adapters / "medical", seed=1, strength=0.5)
    (block,) = [block for block in documented_examples("bash") if "lora" in block]
    load, unload = block.strip().splitlines()
    with httpx.Client(base_url=tools_service.url, timeout=60) as client:
        plain = answer(client, "smollm2-135m")
        assert run(load, tools_service) == "Success: LoRA adapter 'medical' added successfully."
        (card,) = [card for card in client.get("/v1/models").json()["data"] if card["id"] == "medical"]
        assert (card["parent"], card["root"]) == ("smollm2-135m", str(folder))
        adapted = answer(client, "medical")
        assert adapted["model"] == "medical"
        assert adapted["token_ids"] != plain["token_ids"]
        assert answer(client, "smollm2-135m")["token_ids"] == plain["token_ids"]
        # The service computes in int8 or bfloat16: the first token is certain enough to be that of float32.
        (reference,) = generated_answers(merged(model, folder), [GreedyRequest(PROMPT, 1)])
        assert adapted["token_ids"][0] == reference[0]
        assert run(unload, tools_service) == "Success: LoRA adapter 'medical' removed successfully."
        assert client.post("/generate", json={"prompt": "hi", "model": "medical"}).status_code == 404


def answer(client: httpx.Client, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": list(PROMPT), "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return {"model": found["model"], "token_ids": found["choices"][0]["token_ids"]}


def run(command: str, service: ToolsService) -> str:
    """The output of a documented command, with the port and the folder of the service."""
    command = command.replace("localhost:8000", f"localhost:{service.port}").replace(
        "/adapters/", f"{service.adapters}/"
    )
    done = subprocess.run([*shlex.split(command), "-s", "--fail-with-body"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
