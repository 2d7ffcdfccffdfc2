"""Drives a real engine with many requests at once, and knows what `model.generate()` says to each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from serve_app.config import Deployment, Engine as EngineConfig, Model
from serve_app.core.events import TokenEvent
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams, TokenPrompt
from serve_app.engines.native.engine import Engine
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.native.stream import TokenStream

_DEPLOYMENT = Deployment(max_ongoing_requests=64, max_queued_requests=64, num_replicas=1)


@dataclass(frozen=True)
class Ask:
    """A prompt, the length of its answer, and how many tokens its reader stays for (None: all)."""

    prompt: tuple[int, ...]
    tokens: int
    leaves_after: int | None = None


def model_config(source: str | Path, **engine: int) -> Model:
    return Model(name="m", source=str(source), dtype="float32", deployment=_DEPLOYMENT, engine=EngineConfig(**engine))


@contextmanager
def running(model: Model, kv_tokens: int | None = None) -> Iterator[Engine]:
    """With less memory than the configuration gives, if told so."""

    def make() -> TorchRunner:
        runner = TorchRunner.from_config(model, lambda stage: None)
        runner.kv_tokens = kv_tokens or runner.kv_tokens
        return runner

    engine = Engine(make, model.engine)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def ask(
    engine: Engine, prompt: Prompt, params: SamplingParams, leaves_after: int | None = None
) -> list[TokenEvent]:
    stream = TokenStream(GenerationRequest("id", "m", prompt, params, time.monotonic(), time.monotonic() + 900))
    refusals = await asyncio.to_thread(engine.admit, [stream])
    assert refusals == [None]
    events: list[TokenEvent] = []
    try:
        async for chunk in stream.chunks(0.0):
            events += chunk.events
            if leaves_after is not None and len(events) >= leaves_after:
                break
    finally:
        stream.close()
    return events


async def greedy(engine: Engine, asked: Ask) -> list[int]:
    params = SamplingParams(max_tokens=asked.tokens, temperature=0.0, ignore_eos=True)
    return [e.token_id for e in await ask(engine, TokenPrompt(asked.prompt), params, asked.leaves_after)]


async def crowd(engine: Engine, asks: list[Ask], seed: int, within_s: float = 0.05) -> list[list[int]]:
    """All of them at random moments of the same few steps."""
    rng = random.Random(seed)

    async def later(asked: Ask, delay_s: float) -> list[int]:
        await asyncio.sleep(delay_s)
        return await greedy(engine, asked)

    return await asyncio.gather(*(later(asked, rng.random() * within_s) for asked in asks))


def random_asks(count: int, vocabulary: int, longest_prompt: int, longest_answer: int, seed: int) -> list[Ask]:
    """Every fourth reader leaves early. Of three prompts one begins as its kind does, for most of it; one is short."""
    rng = random.Random(seed)
    beginning = tuple(rng.randrange(vocabulary) for _ in range(longest_prompt - longest_prompt // 8))
    asks = []
    for i in range(count):
        prompt = beginning if i % 3 == 0 else ()
        longest = longest_prompt // 4 if i % 3 == 1 else longest_prompt - len(prompt)
        prompt += tuple(rng.randrange(vocabulary) for _ in range(rng.randint(1, longest)))
        tokens = rng.randint(2, longest_answer)
        asks.append(Ask(prompt, tokens, rng.randint(1, tokens) if i % 4 == 3 else None))
    return asks


@torch.inference_mode()
def generated(folder: str | Path, asks: list[Ask]) -> list[list[int]]:
    """What transformers' own generate() answers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for asked in asks:
        ids = torch.tensor([asked.prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=asked.tokens,
            min_new_tokens=asked.tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


async def idle(engine: Engine) -> None:
    """Wait until nobody is in the engine; the last who left is let go at its next step."""
    async with asyncio.timeout(5):
        while engine.stats().running or engine.stats().waiting:  # noqa: ASYNC110 - another thread's state
            await asyncio.sleep(0.005)


def agree(answers: list[list[int]], references: list[list[int]], asks: list[Ask]) -> None:
    """Every reader got the reference's tokens: all of them, or those up to where it left."""
    for answer, reference, asked in zip(answers, references, asks, strict=True):
        if asked.leaves_after is None:
            assert answer == reference, f"prompt of {len(asked.prompt)}"
        else:
            assert len(answer) >= asked.leaves_after
            assert answer == reference[: len(answer)]
