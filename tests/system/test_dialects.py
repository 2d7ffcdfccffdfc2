"""The same greedy conversation in every dialect: the dialects encode the events of one engine, so the text is equal."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import openai
import pytest
from huggingface_hub import InferenceClient

from tests.system.service import ShippedService

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
MESSAGES: Any = [
    {"role": "system", "content": "You are a geographer."},
    {"role": "user", "content": "Name three rivers of Poland."},
]
TOKENS = 24


def test_the_same_greedy_request_has_the_same_text_in_every_dialect(service: ShippedService) -> None:
    greedy: Any = {"model": MODEL, "temperature": 0, "max_tokens": TOKENS}
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none") as client:
        answer = client.chat.completions.create(messages=MESSAGES, **greedy)
        said = answer.choices[0].message.content
        response = client.responses.create(
            model=MODEL, instructions=MESSAGES[0]["content"], input=MESSAGES[1]["content"], temperature=0,
            max_output_tokens=TOKENS,
        )  # fmt: skip
    assert said
    assert answer.usage is not None
    with anthropic.Anthropic(base_url=service.url, api_key="none") as claude:
        message = claude.messages.create(
            model=MODEL, max_tokens=TOKENS, system=MESSAGES[0]["content"], messages=MESSAGES[1:],
            extra_body={"temperature": 0},
        )  # fmt: skip
    (first,) = message.content
    assert first.type == "text"
    texts = {"responses": response.output_text, "messages": first.text}
    with httpx.Client(base_url=service.url, timeout=60) as http:
        # The other dialects take the text that the chat template writes, control tokens included.
        ids = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        prompt = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert len(ids) == answer.usage.prompt_tokens
        texts["native"] = http.post("/generate", json={"prompt": prompt, **greedy}).json()["text"]
        completion = http.post("/v1/completions", json={"prompt": prompt, **greedy}).json()
        texts["completions"] = completion["choices"][0]["text"]
    texts["tgi"] = InferenceClient(service.url).text_generation(prompt, max_new_tokens=TOKENS, do_sample=False)
    assert texts == dict.fromkeys(texts, said)
    assert completion["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
