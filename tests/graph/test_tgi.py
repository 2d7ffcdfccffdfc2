"""huggingface_hub's client of TGI against the whole service."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from tests.graph.service import Service

pytestmark = pytest.mark.ray

# The toy model repeats its prompt, one byte per token.
TEXT = "Grüße, 世界 🌍!"
SIZE = len(TEXT.encode())


@pytest.fixture
def hub(toy_service: Service) -> InferenceClient:
    return InferenceClient(toy_service.url + "/?model=toy", timeout=60)


def test_text_whole_and_streamed(hub: InferenceClient) -> None:
    assert hub.text_generation(TEXT, max_new_tokens=SIZE) == TEXT
    assert hub.text_generation(TEXT, max_new_tokens=SIZE, return_full_text=True) == TEXT * 2
    assert "".join(hub.text_generation(TEXT, max_new_tokens=SIZE, stream=True)) == TEXT
    assert len(hub.text_generation("ab")) == 100, "as many tokens as TGI's clients expect"


def test_details_whole_and_streamed(hub: InferenceClient) -> None:
    answer = hub.text_generation(TEXT, max_new_tokens=SIZE, details=True)
    assert answer.details is not None
    assert (answer.generated_text, answer.details.finish_reason, answer.details.prefill) == (TEXT, "length", [])
    assert [token.id for token in answer.details.tokens] == list(TEXT.encode())
    assert "".join(token.text for token in answer.details.tokens) == TEXT
    events = list(hub.text_generation(TEXT, max_new_tokens=SIZE, details=True, stream=True))
    assert [dict(event.token) for event in events] == [dict(token) for token in answer.details.tokens]
    assert [event.index for event in events] == list(range(1, SIZE + 1))
    last = events[-1].details
    assert last is not None
    assert (events[-1].generated_text, last.finish_reason, last.generated_tokens, last.input_length) == (
        TEXT, "length", SIZE, SIZE,
    )  # fmt: skip


def test_details_of_the_prompt(hub: InferenceClient) -> None:
    answer = hub.text_generation(TEXT, max_new_tokens=1, details=True, decoder_input_details=True)
    assert answer.details is not None
    assert [token.id for token in answer.details.prefill] == list(TEXT.encode())
    assert [token.logprob for token in answer.details.prefill] == [None, *[0.0] * (SIZE - 1)]
    with pytest.raises(ValidationError, match=r"parameters\.decoder_input_details"):
        hub.text_generation(TEXT, details=True, decoder_input_details=True, stream=True)


def test_the_finish_reason_of_a_stop_sequence(hub: InferenceClient) -> None:
    stopped = hub.text_generation("one. two.", stop=["."], details=True)
    assert stopped.details is not None
    assert (stopped.generated_text, stopped.details.finish_reason) == ("one.", "stop_sequence")


def test_errors_raise_the_clients_exceptions(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match=r"parameters\.typical_p"):
        hub.text_generation(TEXT, do_sample=True, typical_p=0.5)
    with pytest.raises(ValidationError, match="4096"):
        hub.text_generation("x" * 5000)
    grammar: Any = {"type": "regex", "value": "a"}
    with pytest.raises(ValidationError, match="grammar"):
        list(hub.text_generation(TEXT, grammar=grammar, stream=True))


async def test_16_concurrent_streams_get_their_own_answers(toy_service: Service) -> None:
    async with AsyncInferenceClient(toy_service.url + "/?model=toy", timeout=60) as hub:

        async def send(i: int) -> None:
            prompt = f"request {i} of many"
            stream = await hub.text_generation(prompt, max_new_tokens=len(prompt), stream=True)
            assert "".join([text async for text in stream]) == prompt

        await asyncio.gather(*(send(i) for i in range(16)))


async def test_best_of_returns_the_other_sequences(client: httpx.AsyncClient) -> None:
    body = {"inputs": "ab", "model": "toy", "parameters": {"best_of": 3, "do_sample": True, "details": True}}
    answer = (await client.post("/generate", json=body)).json()
    assert len(answer["details"]["best_of_sequences"]) == 2
    completion = {"model": "toy", "prompt": "ab", "best_of": 3, "n": 2, "max_tokens": 4}
    completion_answer = (await client.post("/v1/completions", json=completion)).json()
    assert [choice["text"] for choice in completion_answer["choices"]] == ["abab"] * 2
    assert completion_answer["usage"]["completion_tokens"] == 12


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"model": "toy", "prompt": TEXT})).json()
    assert answer == {"count": SIZE, "max_model_len": 4096, "tokens": list(TEXT.encode()), "token_strs": None}
    back = await client.post("/detokenize", json={"model": "toy", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": TEXT}
    wrong = await client.post("/detokenize", json={"model": "toy", "tokens": [257]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "tokens")
