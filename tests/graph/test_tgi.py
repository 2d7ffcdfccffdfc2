"""huggingface_hub's own client, over the whole graph."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from tests.graph.house import Service, state, until

pytestmark = pytest.mark.ray

# The toy says its own prompt, a byte a token.
TEXT = "Grüße, 世界 🌍!"
SIZE = len(TEXT.encode())


@pytest.fixture
def hub(toys: Service) -> InferenceClient:
    return InferenceClient(toys.url + "/?model=toy", timeout=60)


def test_the_client_has_the_text(hub: InferenceClient) -> None:
    assert hub.text_generation(TEXT, max_new_tokens=SIZE) == TEXT
    assert hub.text_generation(TEXT, max_new_tokens=SIZE, return_full_text=True) == TEXT * 2
    assert "".join(hub.text_generation(TEXT, max_new_tokens=SIZE, stream=True)) == TEXT
    assert len(hub.text_generation("ab")) == 100, "as many tokens as TGI's clients expect"


def test_the_client_has_the_details(hub: InferenceClient) -> None:
    told = hub.text_generation(TEXT, max_new_tokens=SIZE, details=True)
    assert told.details is not None
    assert (told.generated_text, told.details.finish_reason, told.details.prefill) == (TEXT, "length", [])
    assert [token.id for token in told.details.tokens] == list(TEXT.encode())
    assert "".join(token.text for token in told.details.tokens) == TEXT
    events = list(hub.text_generation(TEXT, max_new_tokens=SIZE, details=True, stream=True))
    assert [dict(event.token) for event in events] == [dict(token) for token in told.details.tokens]
    assert [event.index for event in events] == list(range(1, SIZE + 1))
    last = events[-1].details
    assert last is not None
    assert (events[-1].generated_text, last.finish_reason, last.generated_tokens, last.input_length) == (
        TEXT, "length", SIZE, SIZE,
    )  # fmt: skip


def test_the_client_has_the_details_of_its_prompt(hub: InferenceClient) -> None:
    told = hub.text_generation(TEXT, max_new_tokens=1, details=True, decoder_input_details=True)
    assert told.details is not None
    assert [token.id for token in told.details.prefill] == list(TEXT.encode())
    assert [token.logprob for token in told.details.prefill] == [None, *[0.0] * (SIZE - 1)]
    with pytest.raises(ValidationError, match=r"parameters\.decoder_input_details is told with a whole answer"):
        hub.text_generation(TEXT, details=True, decoder_input_details=True, stream=True)


def test_the_client_sees_why_an_answer_ended(hub: InferenceClient) -> None:
    stopped = hub.text_generation("one. two.", stop=["."], details=True)
    assert stopped.details is not None
    assert (stopped.generated_text, stopped.details.finish_reason) == ("one.", "stop_sequence")


def test_the_client_hears_what_is_wrong(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match=r"parameters\.typical_p is not honoured"):
        hub.text_generation(TEXT, typical_p=0.5)
    with pytest.raises(ValidationError, match="2048"):
        hub.text_generation("x" * 3000)
    grammar: Any = {"type": "regex", "value": "a"}
    with pytest.raises(ValidationError, match="no grammar"):
        list(hub.text_generation(TEXT, grammar=grammar, stream=True))


async def test_many_clients_at_once_have_their_own_answers(toys: Service) -> None:
    async with AsyncInferenceClient(toys.url + "/?model=toy", timeout=60) as hub:

        async def ask(i: int) -> None:
            prompt = f"request {i} of many"
            stream = await hub.text_generation(prompt, max_new_tokens=len(prompt), stream=True)
            assert "".join([text async for text in stream]) == prompt

        await asyncio.gather(*(ask(i) for i in range(16)))


async def test_the_best_of_several_is_there(client: httpx.AsyncClient) -> None:
    body = {"inputs": "ab", "model": "toy", "parameters": {"best_of": 3, "do_sample": True, "details": True}}
    answer = (await client.post("/generate", json=body)).json()
    assert len(answer["details"]["best_of_sequences"]) == 2
    completion = {"model": "toy", "prompt": "ab", "best_of": 3, "n": 2, "max_tokens": 4}
    said = (await client.post("/v1/completions", json=completion)).json()
    assert [choice["text"] for choice in said["choices"]] == ["abab"] * 2
    assert said["usage"]["completion_tokens"] == 12


async def test_tokens_and_back(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"model": "toy", "prompt": TEXT})).json()
    assert answer == {"count": SIZE, "max_model_len": 2048, "tokens": list(TEXT.encode()), "token_strs": None}
    back = await client.post("/detokenize", json={"model": "toy", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": TEXT}
    wrong = await client.post("/detokenize", json={"model": "toy", "tokens": [257]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "tokens")


async def test_asking_about_a_sleeper_leaves_it_asleep(client: httpx.AsyncClient) -> None:
    async def asleep() -> bool:
        return await state(client, "sleepy") == "asleep"

    await until(asleep, seconds=60)
    for _ in range(3):
        info = (await client.get("/info", params={"model": "sleepy"})).json()
        assert info["model_id"] == "sleepy"
        await asyncio.sleep(1)
        assert await asleep()
    answer = await client.post("/tokenize", json={"model": "sleepy", "prompt": "ab"})
    assert answer.json()["tokens"] == [97, 98], "what needs the model wakes it"
