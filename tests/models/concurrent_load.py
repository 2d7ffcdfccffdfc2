"""Runs a real engine under concurrent requests, and computes the reference answers by `model.generate()`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from serve_app.config import Deployment, Model, NativeOptions
from serve_app.core.events import TokenEvent
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams, TokenPrompt
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.protocol import ReplicaEngine
from serve_app.engines.stream import TokenStream

_DEPLOYMENT = Deployment(max_ongoing_requests=64, max_queued_requests=64, num_replicas=1)


@dataclass(frozen=True)
class GreedyRequest:
    """A prompt, the length of its answer, and the number of tokens after which the client cancels (None: never)."""

    prompt: tuple[int, ...]
    max_tokens: int
    cancel_after: int | None = None


def model_config(source: str | Path, **engine: int) -> Model:
    """A model in float32 without quantization, unless `model_copy` changes it.

    The packed weights of a folder, which a test has made, are not kept in the user's cache folder.
    """
    engine.setdefault("cache_weights", str(source).startswith("builtin:"))
    return Model(
        name="m",
        source=str(source),
        dtype="float32",
        quantization="none",
        deployment=_DEPLOYMENT,
        engine=NativeOptions(**engine),
    )


@contextmanager
def running(
    model: Model, kv_tokens: int | None = None, change: Callable[[TorchRunner], None] = lambda runner: None
) -> Iterator[NativeEngine]:
    """An engine; `kv_tokens` replaces the number of tokens that the configured memory holds.

    `change` is called with its runner before the engine uses it.
    """

    def make() -> TorchRunner:
        runner = TorchRunner.from_config(model, lambda stage: None)
        runner.kv_tokens = kv_tokens or runner.kv_tokens
        change(runner)
        return runner

    engine = NativeEngine(make, model.native_options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def admit(engine: ReplicaEngine, *streams: TokenStream) -> None:
    """All in one call, so that they run beside one another however fast the engine is."""
    assert await asyncio.to_thread(engine.admit, list(streams)) == [None] * len(streams)


def stream_of(prompt: Prompt, params: SamplingParams, embed: bool = False) -> TokenStream:
    now = time.monotonic()
    return TokenStream(GenerationRequest("id", "m", prompt, params, now, now + 900, embed=embed))


async def read(stream: TokenStream, cancel_after: int | None = None) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    try:
        async for chunk in stream.chunks(0.0):
            events += chunk.events
            if cancel_after is not None and len(events) >= cancel_after:
                break
    finally:
        stream.close()
    return events


async def generate(
    engine: ReplicaEngine, prompt: Prompt, params: SamplingParams, cancel_after: int | None = None
) -> list[TokenEvent]:
    stream = stream_of(prompt, params)
    await admit(engine, stream)
    return await read(stream, cancel_after)


async def generate_at_once(engine: ReplicaEngine, requests: list[GreedyRequest]) -> list[list[int]]:
    """The answers to all requests, which arrive at the same moment."""
    streams = [
        stream_of(
            TokenPrompt(request.prompt),
            SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True),
        )
        for request in requests
    ]
    await admit(engine, *streams)
    answers = await asyncio.gather(
        *(read(stream, request.cancel_after) for stream, request in zip(streams, requests, strict=True))
    )
    return [[event.token_id for event in answer] for answer in answers]


async def generate_greedy(engine: ReplicaEngine, request: GreedyRequest) -> list[int]:
    (answer,) = await generate_at_once(engine, [request])
    return answer


async def generate_concurrently(engine: ReplicaEngine, requests: list[GreedyRequest], seed: int) -> list[list[int]]:
    """The answers to all requests, which arrive at random moments within 50 ms, during the same few steps."""
    rng = random.Random(seed)

    async def later(request: GreedyRequest, delay_s: float) -> list[int]:
        await asyncio.sleep(delay_s)
        return await generate_greedy(engine, request)

    return await asyncio.gather(*(later(request, rng.random() * 0.05) for request in requests))


def random_requests(
    count: int, vocabulary: int, longest_prompt: int, longest_answer: int, seed: int
) -> list[GreedyRequest]:
    """Every fourth request is cancelled. Of three prompts one starts with a shared prefix, and one is short."""
    rng = random.Random(seed)
    prefix = tuple(rng.randrange(vocabulary) for _ in range(longest_prompt - longest_prompt // 8))
    requests = []
    for i in range(count):
        prompt = prefix if i % 3 == 0 else ()
        longest = longest_prompt // 4 if i % 3 == 1 else longest_prompt - len(prompt)
        prompt += tuple(rng.randrange(vocabulary) for _ in range(rng.randint(1, longest)))
        tokens = rng.randint(2, longest_answer)
        requests.append(GreedyRequest(prompt, tokens, rng.randint(1, tokens) if i % 4 == 3 else None))
    return requests


def reference_answers(folder: str | Path, requests: list[GreedyRequest]) -> list[list[int]]:
    """The answers of the model in the folder, by transformers' own generate()."""
    return generated_answers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), requests)


@torch.inference_mode()
def generated_answers(model: PreTrainedModel, requests: list[GreedyRequest]) -> list[list[int]]:
    """The answers of transformers' own generate(), one prompt at a time."""
    answers = []
    for request in requests:
        ids = torch.tensor([request.prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.max_tokens,
            min_new_tokens=request.max_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


async def wait_until_idle(engine: ReplicaEngine) -> None:
    """Wait until the engine has no request; it frees a cancelled request at its next step."""
    async with asyncio.timeout(5):
        while engine.stats().running or engine.stats().waiting:  # noqa: ASYNC110 - another thread's state
            await asyncio.sleep(0.005)


def assert_answers(answers: list[list[int]], references: list[list[int]], requests: list[GreedyRequest]) -> None:
    """Each answer is the reference, for a cancelled request the reference up to the cancellation."""
    for answer, reference, request in zip(answers, references, requests, strict=True):
        if request.cancel_after is None:
            assert answer == reference, f"prompt of {len(request.prompt)}"
        else:
            assert len(answer) >= request.cancel_after
            assert answer == reference[: len(answer)]
