"""GuideLLM: load tests of streamed chats, completions and responses.

Its data loader needs PyTorch, which the environment of the clients does not have: the environment variable TORCH names
the folder of packages that has it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import FRANCE, run

sys.path.append(os.environ["TORCH"])
os.environ["HF_HUB_OFFLINE"] = "1"  # the data is local

REQUESTS, TOKENS = 6, 16


def load_test(url: str, kind: str, **backend: Any) -> dict[str, Any]:
    """The metrics of a run with `REQUESTS` requests, two at a time. `kind` is the path of the API."""
    from guidellm.cli import cli

    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "data.jsonl"), Path(folder, "report.json")
        # GuideLLM waits for more data when its requests have used all of it.
        rows = [{"prompt": f"{number}. {FRANCE}"} for number in range(2 * REQUESTS)]
        data.write_text("\n".join(json.dumps(row) for row in rows))
        fields = {"target": url, "request_format": kind, "max_tokens": TOKENS, **backend}
        options = {
            "backend": "kind=openai_http," + ",".join(f"{name}={value}" for name, value in fields.items()),
            "data": f"kind=json_file,path={data}",
            "profile": "kind=concurrent,streams=2",
            "constraint": f"kind=max_requests,count={REQUESTS}",
            "output": f"kind=json,path={report}",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        cli(["run", *arguments, "--disable-console"], standalone_mode=False)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics: dict[str, Any] = benchmark["metrics"]
    return metrics


async def streamed(url: str, kind: str) -> dict[str, float]:
    """Every request succeeds, and the numbers of tokens are those of the service."""
    metrics = await asyncio.to_thread(load_test, url, kind)
    assert metrics["request_totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    ttft, tokens, prompt = (
        metrics[name]["successful"] for name in ("time_to_first_token_ms", "output_token_count", "prompt_token_count")
    )
    assert ttft["min"] > 0
    assert 1 <= tokens["min"] <= tokens["max"] <= TOKENS, tokens
    assert prompt["min"] > 8
    return {"ttft_ms": ttft["median"], "tokens": tokens["total_sum"]}


async def quickstart(url: str) -> dict[str, float]:
    return await streamed(url, "/v1/chat/completions")


async def completions(url: str) -> dict[str, float]:
    return await streamed(url, "/v1/completions")


async def responses(url: str) -> dict[str, float]:
    return await streamed(url, "/v1/responses")


async def errors(url: str) -> int:
    metrics = await asyncio.to_thread(load_test, url, "/v1/chat/completions", model="gpt-unknown")
    assert (metrics["request_totals"]["successful"], metrics["request_totals"]["errored"]) == (0, REQUESTS)
    return REQUESTS


if __name__ == "__main__":  # GuideLLM starts processes that import this module
    run(quickstart, completions, responses, errors)
