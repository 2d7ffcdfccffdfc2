"""LoRA adapters with random weights, written and merged by PEFT, and an engine that serves them."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from serve_app.config import Lora, LoraAdapter, Model
from serve_app.core.requests import Adapter, GenerationRequest, SamplingParams, TokenPrompt
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.protocol import ReplicaEngine
from serve_app.engines.stream import TokenStream
from tests.models.concurrent_load import GreedyRequest, admit, read, stream_of

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def deprecated_names() -> Iterator[None]:
    """PEFT reads an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def save_adapter(model: Path, folder: Path, seed: int, strength: float = 0.1, **settings: Any) -> Path:
    """Write an adapter of the model, whose two factors are both random."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS, **settings})
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with deprecated_names():
        adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=strength)
    adapted.save_pretrained(str(folder))
    return folder


def merged(model: Path, adapter: Path) -> PreTrainedModel:
    """The model in float32, into which PEFT has merged the adapter."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with deprecated_names():
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()


def with_adapters(model: Model, *folders: Path, **lora: Any) -> Model:
    """The model with one adapter for each folder, by the folder's name."""
    adapters = tuple(LoraAdapter(name=folder.name, source=str(folder)) for folder in folders)
    return model.model_copy(update={"lora": Lora(adapters=adapters, **lora)})


@contextmanager
def serving(model: Model) -> Iterator[NativeEngine]:
    engine = NativeEngine(
        lambda: TorchRunner.from_config(model, lambda stage: None), model.native_options, lora=model.lora
    )
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


def adapter_of(folder: Path | None, digest: str = "") -> Adapter | None:
    return None if folder is None else Adapter(folder.name, str(folder), digest=digest)


def open_stream(request: GreedyRequest, adapter: Adapter | None, **fields: Any) -> TokenStream:
    params = SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True)
    stream = stream_of(TokenPrompt(request.prompt), params)
    values = {name: getattr(stream.request, name) for name in GenerationRequest.__slots__}
    return TokenStream(GenerationRequest(**{**values, "adapter": adapter, **fields}))


async def answers_of(
    engine: ReplicaEngine, requests: Sequence[tuple[GreedyRequest, Adapter | None]]
) -> list[list[int]]:
    """The answers to all requests, which arrive at the same moment."""
    streams = [open_stream(request, adapter) for request, adapter in requests]
    for stream in streams:
        assert engine.acquire_adapter(stream) is None
    await admit(engine, *streams)
    answers = await asyncio.gather(*map(read, streams))
    return [[event.token_id for event in answer] for answer in answers]
