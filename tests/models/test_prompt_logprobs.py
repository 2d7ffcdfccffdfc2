"""Log probabilities and embeddings of prompts, compared with transformers' logits and hidden states."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.config import Model
from serve_app.core.events import Logprobs
from serve_app.core.requests import SamplingParams, TokenPrompt
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native import kernels
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.fused import FusedModel
from serve_app.engines.native.fused_weights import fused_weights
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.native.loader import Loaded, load
from serve_app.engines.native.preparation import prepare
from serve_app.engines.native.quantization import Quantization
from serve_app.engines.native.rows import span
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.stream import TokenStream
from tests.models import tiny
from tests.models.concurrent_load import admit, model_config, running, stream_of, wait_until_idle

pytestmark = pytest.mark.model

Prompt = tuple[int, ...]
TOP = 3
# The least cosine with float32 that rounding explains, on three layers with random weights.
MIN_COSINE = {"none": 0.9997, "int8": 0.96, "int4": 0.93}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small a second thread only adds waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(count: int, longest: int = 60) -> list[Prompt]:
    """Half of the prompts share a prefix; one has a single token."""
    rng = random.Random(3)
    beginning = tuple(rng.randrange(tiny.VOCABULARY) for _ in range(longest // 2))
    made = [
        (beginning if n % 2 else ())
        + tuple(rng.randrange(tiny.VOCABULARY) for _ in range(rng.randint(2, longest // 2)))
        for n in range(count)
    ]
    return [*made, (5,)]


def prompt_stream(prompt: Prompt, embed: bool = False, tokens: int = 4) -> TokenStream:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, prompt_logprobs=None if embed else TOP)
    return stream_of(TokenPrompt(prompt), params, embed)


async def read_logprobs(stream: TokenStream) -> tuple[Logprobs, ...]:
    first, *others = [chunk async for chunk in stream.chunks(0.0)]
    assert first.prompt is not None
    assert all(chunk.prompt is None for chunk in others)
    return first.prompt.logprobs


async def read_embedding(stream: TokenStream, prompt: Prompt) -> torch.Tensor:
    (chunk,) = [chunk async for chunk in stream.chunks(0.0)]
    assert chunk.embedding is not None
    assert (chunk.events, chunk.prompt_tokens, chunk.cached_tokens) == ((), len(prompt), 0)
    return torch.tensor(chunk.embedding)


async def logprobs_of(engine: NativeEngine, prompt: Prompt) -> tuple[Logprobs, ...]:
    stream = prompt_stream(prompt)
    await admit(engine, stream)
    return await read_logprobs(stream)


async def embedding_of(engine: NativeEngine, prompt: Prompt) -> torch.Tensor:
    stream = prompt_stream(prompt, embed=True)
    await admit(engine, stream)
    return await read_embedding(stream, prompt)


@torch.inference_mode()
def reference(folder: Path, requested: Seq[Prompt]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log probabilities after each token but the last, and embeddings, of each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs, embeddings = [], []
    for prompt in requested:
        ids = torch.tensor([prompt])
        logprobs.append(model(ids).logits[0, :-1].log_softmax(-1))
        states = model.base_model(ids).last_hidden_state[0]
        embeddings.append(torch.nn.functional.normalize(states.mean(0), dim=0))
    return logprobs, embeddings


def assert_logprobs(found: tuple[Logprobs, ...], prompt: Prompt, wanted: torch.Tensor, error: float = 2e-4) -> None:
    assert [one.chosen.token_id for one in found] == list(prompt[1:])
    for one, row in zip(found, wanted, strict=True):
        chosen = row[one.chosen.token_id]
        assert one.chosen.logprob == pytest.approx(chosen.item(), abs=error)
        assert [top.logprob for top in one.top] == pytest.approx(row.topk(TOP).values.tolist(), abs=error)
        assert [top.logprob for top in one.top] == pytest.approx(
            [row[top.token_id].item() for top in one.top], abs=error
        )
        assert one.rank is not None
        assert (row > chosen + error).sum() < one.rank <= (row >= chosen - error).sum()


@pytest.mark.parametrize("family", tiny.every(tiny.FAMILIES))
async def test_prompt_results_of_the_hugging_face_path_equal_transformers(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path), "transformers")


@pytest.mark.parametrize("family", tiny.FUSED)
async def test_prompt_results_of_the_fused_path_equal_transformers(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path, tiny.FUSED), "fused")


async def check(folder: Path, kind: str) -> None:
    """Prompts in chunks, alone and under concurrent load; some are preempted and computed twice."""
    requested = prompts(7)
    logprobs, embeddings = reference(folder, requested)
    config = model_config(folder, max_running=5, max_context=96, max_step_tokens=16, threads=1)
    with running(config, kv_tokens=6 * BLOCK) as engine:
        assert engine.kind == kind
        for prompt, wanted, vector in zip(requested[:2], logprobs, embeddings, strict=False):
            assert_logprobs(await logprobs_of(engine, prompt), prompt, wanted)
            assert torch.cosine_similarity(await embedding_of(engine, prompt), vector, dim=0) > 0.999
        pairs = [
            (prompt_stream(prompt, embed=False, tokens=30), prompt_stream(prompt, embed=True)) for prompt in requested
        ]
        await admit(engine, *(stream for pair in pairs for stream in pair))
        found = await asyncio.gather(
            *(
                asyncio.gather(read_logprobs(first), read_embedding(second, prompt))
                for prompt, (first, second) in zip(requested, pairs, strict=True)
            )
        )
        for prompt, wanted, vector, (first, second) in zip(requested, logprobs, embeddings, found, strict=True):
            assert_logprobs(first, prompt, wanted)
            assert torch.cosine_similarity(second, vector, dim=0) > 0.999
            assert second.norm().item() == pytest.approx(1, abs=1e-5)
        await wait_until_idle(engine)
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", tiny.every([*tiny.FUSED, "gpt2"], ["qwen2", "qwen3"]))
async def test_quantized_prompt_results_are_close_and_independent_of_load(
    family: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    """Also where smoothing divided channels. Log probabilities are equal to the bit alone and under concurrent load.

    The products of MKL and oneDNN are excepted: the order of their sums depends on the number of rows.
    """
    folder = tiny.save(family, tmp_path, tiny.FAMILIES | tiny.FUSED)
    requested = prompts(4)
    logprobs, embeddings = reference(folder, requested)
    config = model_config(folder, max_running=4, max_context=96, max_step_tokens=24, threads=1)
    config = config.model_copy(update={"dtype": dtype, "quantization": quantization})
    with running(config) as engine:
        assert engine.kind == ("fused" if family in tiny.FUSED else "transformers")
        alone = [(await logprobs_of(engine, prompt), await embedding_of(engine, prompt)) for prompt in requested]
        together = await asyncio.gather(*(logprobs_of(engine, prompt) for prompt in requested))
    vectors = torch.stack([vector for _, vector in alone])
    cosine = torch.cosine_similarity(vectors, torch.stack(embeddings), dim=-1)
    # A rounded row may choose another expert.
    experts = any("experts" in name for name in json.loads((folder / "config.json").read_text()))
    like = cosine.median() + 0.03 if experts else cosine.min()
    assert like > MIN_COSINE[quantization], cosine
    own = quantization != "none" or dtype == "bfloat16"
    for prompt, wanted, (first, _), again in zip(requested, logprobs, alone, together, strict=True):
        assert len(first) == len(wanted) == len(prompt) - 1
        if own and family in tiny.FUSED:
            assert [one.chosen for one in first] == [one.chosen for one in again]
        elif (quantization, dtype) == ("none", "float32"):
            assert_logprobs(again, prompt, wanted)


def silent(config: Model) -> Loaded:
    """A model that does not return its hidden states."""
    loaded = load(config, lambda stage: None)
    forward = loaded.model.forward

    def without(*given: Any, output_hidden_states: bool = False, **named: Any) -> Any:
        return forward(*given, **named)

    loaded.model.forward = without
    return loaded


def test_a_model_without_hidden_states_is_refused_for_embeddings(tmp_path: Path) -> None:
    config = model_config(tiny.save("gpt2", tmp_path), max_running=2, max_context=64)
    assert TorchRunner(prepare(silent(config)), config.native_options).kind == "transformers"
    with pytest.raises(SourceError, match=r"GPT2LMHeadModel does not return hidden states.*embeddings: false"):
        prepare(silent(config), embeddings=True)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_rows_of_one_step_are_separated_after_the_last_layer(quantization: Quantization, tmp_path: Path) -> None:
    """Rows to sample, rows for prompt log probabilities and rows for embeddings."""
    assert kernels.available(print), "this test needs a C++ compiler"
    config = model_config(tiny.save("qwen3", tmp_path, tiny.FUSED), max_running=4, max_context=64)
    loaded = load(config.model_copy(update={"dtype": "bfloat16"}), lambda stage: None)
    weights = fused_weights(loaded.model, [None] * 3, quantization)
    model = FusedModel(weights, TorchRunner(prepare(loaded), config.native_options)._caches)
    rows = span(list(range(20)), slot=0, start=0)
    with torch.inference_mode():
        apart = model.forward(replace(rows, sample_rows=list(range(20)))).logits
        together = model.forward(replace(rows, logprob_rows=[4, 2], embedding_rows=[3, 19, 2]))
        states = model.forward(replace(rows, sample_rows=[], embedding_rows=list(range(20))))
    assert torch.equal(together.logits, apart[[19, 4, 2]])
    assert torch.equal(together.hidden, states.hidden[[3, 19, 2]])
    assert len(states.logits) == 0
