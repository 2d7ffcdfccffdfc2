"""The service with the embedded model: the shipped configuration, and one like it with tools and embeddings."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import httpx
import openai
import yaml

from tests.graph.service import ROOT, SHIPPED_CONFIG, Program, free_port

STORY = {"prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "include_text": False}


def documented_examples(language: str) -> list[str]:
    """The code blocks of this language in README.md and docs/api.md that send requests to the service."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/api.md")]
    blocks = [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]
    return [block for block in blocks if "localhost:8000" in block]


class ShippedService(Program):
    """`python -m serve_app` with the shipped configuration, or one like it, on a free port.

    `first_token_s` is the time from the start of the program to the first streamed token, once `wait_until_ready` has
    returned.
    """

    def __init__(self, config: Path = SHIPPED_CONFIG, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.first_token_s = 0.0
        options = ["--config", str(config), "--port", str(self.port), "--ray-address", "local", "--no-dashboard"]
        super().__init__(["serve_app", *options], **environment)

    def openai_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def wait_until_ready(self) -> None:
        stream = threading.Thread(target=self._stream, daemon=True)
        stream.start()
        self.wait_for_output("answers on", seconds=120)
        stream.join(timeout=60)
        assert self.first_token_s, self.output()

    def _stream(self) -> None:
        """Send a request until it is answered with a token."""
        while self.process.poll() is None:
            try:
                with httpx.stream("POST", self.url + "/generate_stream", json=STORY, timeout=60) as response:
                    if response.status_code == 200 and next(response.iter_lines()).startswith("data: "):
                        self.first_token_s = time.monotonic() - self.started
                        return
            except httpx.TransportError:
                pass
            time.sleep(0.1)


class ToolsService(ShippedService):
    """The shipped configuration with the chat template for tools, with embeddings and LoRA adapters.

    `folder` gets its file; adapters may be loaded from the folder `adapters` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.adapters = folder / "adapters"
        document = yaml.safe_load(SHIPPED_CONFIG.read_text())
        document["applications"][0]["args"]["models"][0] |= {
            "chat_template": "builtin:chatml_tools",
            "embeddings": True,
            "lora": {"allow": [str(self.adapters)]},
        }
        config = folder / "serve_config.yaml"
        config.write_text(yaml.safe_dump(document))
        super().__init__(config)
