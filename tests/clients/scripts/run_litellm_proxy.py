"""LiteLLM's proxy in front of the service, with OpenAI's library and plain HTTP as its clients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, WEATHER_TOOLS, run, weather_of
from pydantic import BaseModel, Field

USER = {"role": "user", "content": FRANCE}
KEY = "sk-of-this-test"


class Town(BaseModel):
    name: str = Field(max_length=20)
    people: int = Field(ge=1, le=9999)


@contextmanager
def proxy(url: str) -> Iterator[str]:
    """The address of a proxy for the service, once it answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    backend = {"model": f"openai/{MODEL}", "api_base": url + "/v1", "api_key": "none"}
    document = {
        "model_list": [
            {"model_name": MODEL, "litellm_params": backend},
            {"model_name": "absent", "litellm_params": {**backend, "model": "openai/gpt-unknown"}},
        ],
        "general_settings": {"master_key": KEY},
    }
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"}
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder, "config.yaml"), Path(folder, "log")
        config.write_text(json.dumps(document))  # JSON is YAML
        command = [Path(sys.executable).with_name("litellm"), "--config", config, "--host", "127.0.0.1"]
        with log.open("w") as output:
            program = subprocess.Popen(
                [*command, "--port", str(port)], stdout=output, stderr=output, env=environment, cwd=folder
            )
            try:
                wait_until_ready(f"http://127.0.0.1:{port}", program, log)
                yield f"http://127.0.0.1:{port}"
            finally:
                program.terminate()
                program.wait(10)
                print(log.read_text()[-4000:], file=sys.stderr)


def wait_until_ready(url: str, program: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and program.poll() is None:
        try:
            if httpx.get(url + "/health/liveliness").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(f"the proxy does not answer: {log.read_text()[-4000:]}")


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0)


def chat(url: str, *messages: Any, **fields: Any) -> Any:
    given: Any = {"model": MODEL, "temperature": 0, "max_tokens": 60, **fields}
    return client(url).chat.completions.create(messages=list(messages), **given)


def quickstart(url: str) -> dict[str, str]:
    answers = {
        "chat": chat(url, USER).choices[0].message.content,
        "responses": client(url).responses.create(model=MODEL, input=FRANCE, temperature=0).output_text,
        "completions": client(url).completions.create(
            model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
        ).choices[0].text,
    }  # fmt: skip
    message = httpx.post(
        url + "/v1/messages",
        headers={"x-api-key": KEY},
        json={"model": MODEL, "max_tokens": 60, "messages": [USER], "temperature": 0},
        timeout=60,
    ).json()
    answers["messages"] = message["content"][0]["text"]
    assert all("Paris" in answer for answer in answers.values()), answers
    return answers


def conversation(url: str) -> str:
    first = chat(url, USER).choices[0].message
    return str(chat(url, USER, first, {"role": "user", "content": "And of Spain?"}).choices[0].message.content)


def stream(url: str) -> dict[str, int]:
    chunks = list(chat(url, USER, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(url, USER).choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0
    responses = list(client(url).responses.create(model=MODEL, input=FRANCE, temperature=0, stream=True))
    assert responses[-1].type == "response.completed"
    return {"chat": len(chunks), "responses": len(responses)}


def tool_loop(url: str) -> list[str]:
    question = {"role": "user", "content": WEATHER}
    first = chat(url, question, tools=WEATHER_TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = first.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather_of("Paris")}
    second = chat(url, question, first.message, result, tools=WEATHER_TOOLS, tool_choice="none").choices[0].message
    assert second.content
    return [call.function.arguments, second.content]


def typed_output(url: str) -> str:
    answer = client(url).chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": TOWN}], response_format=Town, max_tokens=100
    )
    town = answer.choices[0].message.parsed
    assert town is not None
    return town.name


def errors(url: str) -> list[str]:
    """The proxy still answers after errors: it takes no model out of use because a request was wrong."""
    names = []
    for messages, model, expected in (
        ([{"role": "user", "content": OVERFLOW}], MODEL, openai.BadRequestError),
        ([USER], "absent", openai.NotFoundError),
    ):
        try:
            chat(url, *messages, model=model)
        except expected as error:
            names.append(type(error).__name__)
    assert len(names) == 2, names
    assert chat(url, USER).choices[0].message.content
    return names


with proxy(sys.argv[1]) as address:
    sys.argv[1] = address
    run(quickstart, conversation, stream, tool_loop, typed_output, errors)
