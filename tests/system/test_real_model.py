"""The embedded model through the whole service, as the documentation describes it."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from typing import Any

import httpx
import huggingface_hub
import jsonschema
import openai
import psutil
import pytest
from huggingface_hub.errors import ValidationError

from tests.graph.service import ROOT, stream_events, wait_until
from tests.system.service import STORY, ShippedService, documented_examples

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
MIB = 2**20


def memory_mib(service: ShippedService) -> float:
    """The proportional set size of all processes of the service: the memory that its end would free."""
    total = 0
    for process in [*service.descendants(), psutil.Process(service.process.pid)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / MIB


async def test_the_openai_client_gets_the_same_answer_whole_and_streamed(service: ShippedService) -> None:
    async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none") as client:
        whole = await client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=30)
        stream = await client.chat.completions.create(
            model=MODEL, messages=FRANCE, temperature=0, max_tokens=30,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert [model.id async for model in await client.models.list()] == [MODEL]
    said = whole.choices[0].message.content
    assert said is not None
    assert "Paris" in said
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert whole.choices[0].finish_reason == "stop"
    last = chunks[-1].usage
    assert last is not None
    assert whole.usage is not None
    assert (last.prompt_tokens, last.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    # Most of the second prompt is in the prefix cache.
    assert last.prompt_tokens_details is not None
    assert last.prompt_tokens_details.cached_tokens == 32


async def test_an_answer_matches_the_requested_schema(service: ShippedService) -> None:
    """At temperature 1, because the grammar allows nothing else."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "people": {"type": "integer", "minimum": 1, "maximum": 9999},
            "kind": {"enum": ["town", "village"]},
        },
        "required": ["city", "people", "kind"],
        "additionalProperties": False,
    }
    shape: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=FRANCE, temperature=1, seed=3, n=3, max_tokens=120, response_format=shape
        )
        shape["json_schema"]["schema"] = {"type": "nothing"}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=MODEL, messages=FRANCE, response_format=shape)
    assert refused.value.param == "response_format"
    said = [choice.message.content or "" for choice in answer.choices]
    assert len(set(said)) > 1, "each answer draws for itself"
    for text in said:
        jsonschema.validate(json.loads(text), schema)


def test_huggingface_hub_gets_the_details_of_tgi(service: ShippedService) -> None:
    client, prompt = huggingface_hub.InferenceClient(service.url), "The capital of France is"
    whole = client.text_generation(prompt, max_new_tokens=12)
    assert "Paris" in whole
    assert "".join(client.text_generation(prompt, max_new_tokens=12, stream=True)) == whole

    answer = client.text_generation(prompt, max_new_tokens=12, details=True, top_n_tokens=2)
    assert answer.generated_text == whole
    assert answer.details is not None
    assert (answer.details.finish_reason, answer.details.generated_tokens, answer.details.seed) == ("length", 12, None)
    assert "".join(token.text for token in answer.details.tokens) == whole
    assert answer.details.top_tokens is not None
    for token, top in zip(answer.details.tokens, answer.details.top_tokens, strict=True):
        first, second = (dict(one) for one in top)
        assert first["logprob"] >= second["logprob"]
        assert (token.id, token.logprob) == (first["id"], first["logprob"]), "a greedy choice is the likeliest"

    events = list(client.text_generation(prompt, max_new_tokens=12, details=True, stream=True))
    assert [event.token.id for event in events] == [token.id for token in answer.details.tokens]
    assert [event.index for event in events] == list(range(1, 13))
    assert (events[-1].generated_text, [event.generated_text for event in events[:-1]]) == (whole, [None] * 11)
    assert events[-1].details is not None
    assert (events[-1].details.finish_reason, events[-1].details.generated_tokens) == ("length", 12)
    pieces = httpx.post(service.url + "/tokenize", json={"inputs": prompt}).json()
    assert events[-1].details.input_length == len(pieces)
    assert [prompt[piece["start"] : piece["stop"]] for piece in pieces] == [piece["text"] for piece in pieces]


def test_huggingface_hub_sampling_stop_and_grammar(service: ShippedService) -> None:
    client, prompt = huggingface_hub.InferenceClient(service.url), "Once upon a time"
    stopped = client.text_generation(prompt, max_new_tokens=60, stop=["."], details=True, return_full_text=True)
    assert stopped.details is not None
    assert stopped.details.finish_reason == "stop_sequence"
    assert stopped.generated_text.startswith(prompt)
    assert stopped.generated_text.endswith(".")
    assert stopped.generated_text.count(".") == 1

    drawn = client.text_generation(prompt, max_new_tokens=16, do_sample=True, temperature=1.5, details=True)
    assert drawn.details is not None
    assert drawn.details.seed is not None
    again = client.text_generation(prompt, max_new_tokens=16, do_sample=True, temperature=1.5, seed=drawn.details.seed)
    assert again == drawn.generated_text, "the reported seed gives the same answer again"

    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    shape: Any = {"type": "json", "value": schema}
    shaped = client.text_generation(prompt, max_new_tokens=60, grammar=shape)
    jsonschema.validate(json.loads(shaped), schema)
    choice: Any = {"type": "regex", "value": "yes|no"}
    ended = client.text_generation(prompt, max_new_tokens=8, grammar=choice, details=True)
    assert ended.generated_text in ("yes", "no")
    assert ended.details is not None
    assert ended.details.finish_reason == "eos_token"


def test_huggingface_hub_gets_the_logprobs_of_its_prompt(service: ShippedService) -> None:
    client, prompt = huggingface_hub.InferenceClient(service.url), "The capital of France is Paris"
    answer = client.text_generation(prompt, max_new_tokens=1, details=True, decoder_input_details=True)
    assert answer.details is not None
    first, *others = answer.details.prefill
    assert first.logprob is None
    pieces = httpx.post(service.url + "/tokenize", json={"inputs": prompt}).json()
    assert [(token.id, token.text) for token in answer.details.prefill] == [
        (piece["id"], piece["text"]) for piece in pieces
    ]
    assert all(token.logprob < 0 for token in others)
    greedy = client.text_generation(prompt.removesuffix(" Paris"), max_new_tokens=1, details=True)
    assert greedy.details is not None
    (chosen,) = greedy.details.tokens
    assert (others[-1].id, others[-1].logprob) == (chosen.id, pytest.approx(chosen.logprob, abs=0.05))


def test_huggingface_hub_gets_the_most_likely_of_several_answers(service: ShippedService) -> None:
    client = huggingface_hub.InferenceClient(service.url)
    answer = client.text_generation(
        "Once upon a time", max_new_tokens=12, do_sample=True, temperature=1.5, best_of=4, seed=3, details=True
    )
    assert answer.details is not None
    assert answer.details.best_of_sequences is not None
    others = answer.details.best_of_sequences
    assert sorted([answer.details.seed or 0, *(other.seed or 0 for other in others)]) == [3, 4, 5, 6]
    answers: list[Any] = [answer.details, *others]
    means = [sum(token.logprob for token in answer.tokens) / len(answer.tokens) for answer in answers]
    assert len(means) == 4
    assert means[0] == max(means)
    assert len({answer.generated_text, *(other.generated_text for other in others)}) > 1


def test_huggingface_hub_raises_its_exceptions(service: ShippedService) -> None:
    client = huggingface_hub.InferenceClient(service.url)
    with pytest.raises(ValidationError, match="typical_p"):
        client.text_generation("hi", do_sample=True, typical_p=0.9)
    with pytest.raises(ValidationError, match="8192"):
        client.text_generation("word " * 9000)


async def test_tokenize_and_detokenize_are_inverse(service: ShippedService) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        info = (await client.get("/info")).json()
        for text in ("Grüße, 世界 🌍!", " two  spaces", ""):
            answer = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
            assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), info["max_total_tokens"])
            assert len(answer["token_strs"]) == answer["count"]
            if text:
                back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
                assert back.json() == {"prompt": text}
        chat = (await client.post("/tokenize", json={"messages": FRANCE})).json()
        said = await client.post("/v1/chat/completions", json={"messages": FRANCE, "max_tokens": 1})
        assert chat["count"] == said.json()["usage"]["prompt_tokens"]
        unknown = await client.post("/detokenize", json={"tokens": [10**6]})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (422, "tokens")
    assert (info["model_id"], info["model_device_type"], info["max_input_tokens"]) == (MODEL, "cpu", 8191)


async def test_four_answers_cost_one_prefill(service: ShippedService) -> None:
    async def computed(client: httpx.AsyncClient) -> float:
        page = (await client.get("/metrics")).text
        lines = [line for line in page.splitlines() if line.startswith("serve_app_prefix_cache_")]
        asked, found = (
            sum(float(x.split()[-1]) for x in lines if word in x)
            for word in ("queried_tokens_total", "hit_tokens_total")
        )
        return asked - found

    prompt = "The lighthouse keeper wrote down every ship that passed. " * 20
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        before = await computed(client)
        body = {"prompt": prompt, "n": 4, "seed": 1, "max_tokens": 8, "temperature": 1, "cache_salt": "four"}
        answer = (await client.post("/v1/completions", json=body)).json()

        async def counted() -> float:
            now = await computed(client)
            return now if now - before >= answer["usage"]["prompt_tokens"] else 0

        after = await wait_until(counted, seconds=5)
    tokens = answer["usage"]["prompt_tokens"]
    assert len(answer["choices"]) == 4
    assert answer["usage"]["completion_tokens"] == 32
    assert tokens <= after - before <= tokens + 3 * 32, "whole blocks are copied, the rest of a block is not"


async def test_32_concurrent_streams_end_and_use_at_most_4_gib(service: ShippedService) -> None:
    idle = memory_mib(service)

    async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:

        async def stream() -> list[dict[str, Any]]:
            async with client.stream("POST", "/generate_stream", json=STORY) as response:
                return [frame async for frame in stream_events(response)]

        running = [asyncio.create_task(stream()) for _ in range(32)]
        await asyncio.sleep(2)
        busy = await asyncio.to_thread(memory_mib, service)
        streams = await asyncio.gather(*running)
    for frames in streams:
        assert frames[-1]["finish_reason"] == "length"
        assert frames[-1]["usage"]["completion_tokens"] == 64
    print(f"memory of all processes: {idle:.0f} MiB idle, {busy:.0f} MiB with 32 streams")
    assert 1000 < idle < 4096, "the service has been used before, so that its KV cache may have its pages already"
    assert 1000 < busy < 4096


async def test_a_seeded_request_has_the_same_answer_again(service: ShippedService) -> None:
    body = {"prompt": "The sea", "max_tokens": 24, "temperature": 1.0, "seed": 7}
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        answers = [(await client.post("/generate", json=body)).json()["text"] for _ in range(3)]
        other = (await client.post("/generate", json={**body, "seed": 8})).json()["text"]
    assert len(set(answers)) == 1
    assert other != answers[0]


COMMANDS = [command for command in documented_examples("bash") if "lora" not in command and "$KEY" not in command]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda block: block.split("\\\n")[0][:60].strip())
def test_the_documented_commands_work(service: ShippedService, command: str) -> None:
    for line in command.replace("\\\n", " ").strip().splitlines():
        words = shlex.split(line.replace("localhost:8000", f"localhost:{service.port}"), comments=True)
        done = subprocess.run([*words, "--fail-with-body"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout


PROGRAMS = [program for program in documented_examples("python") if "tools" not in program]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_documented_programs_work(service: ShippedService, program: str) -> None:
    program = program.replace("localhost:8000", f"localhost:{service.port}")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10


def test_the_documentation_has_programs_of_each_client() -> None:
    for client in ("openai", "aiohttp", "huggingface_hub"):
        assert any(f"import {client}" in program or f"from {client}" in program for program in PROGRAMS), client


def test_the_metrics_page_has_every_documented_metric(service: ShippedService) -> None:
    """Except those of GPUs."""
    text = httpx.get(service.url + "/metrics").text
    documented = set(re.findall(r"`(serve_app_(?!gpu_)[a-z_]+)`", (ROOT / "docs/operations.md").read_text()))
    assert len(documented) > 10
    assert [name for name in documented if f"# TYPE {name.removesuffix('_total')}" not in text] == []
