from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from tests.graph.service import SHIPPED_CONFIG, Program, free_port

STORY = {"prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "include_text": False}


class Shipped(Program):
    """`python -m serve_app` as it comes: the shipped file, or one like it, and its real model, on a port of its own."""

    def __init__(self, config: Path = SHIPPED, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--config", str(config), "--port", str(self.port), "--ray-address", "local"]
        super().__init__(["serve_app", *options], **environment)

    def official(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="package")
def service() -> Iterator[Shipped]:
    with Shipped() as service:
        service.wait_for("answers on")
        yield service


@pytest.fixture(scope="package")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shipped]:
    """The shipped file, with the template that takes tools, and with embeddings."""
    document = yaml.safe_load(SHIPPED.read_text())
    document["applications"][0]["args"]["models"][0] |= {"chat_template": "builtin:chatml_tools", "embeddings": True}
    config = tmp_path_factory.mktemp("tooled") / "serve_config.yaml"
    config.write_text(yaml.safe_dump(document))
    with Shipped(config) as service:
        service.wait_for("answers on")
        yield service
