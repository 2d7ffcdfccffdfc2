"""Contexts of models with scaled positions, and answers past the range that the model was first trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.engines.native.loader import load
from tests.models import tiny
from tests.models.concurrent_load import (
    GreedyRequest,
    assert_answers,
    generate_concurrently,
    model_config,
    reference_answers,
    running,
)

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def save(family: str, folder: Path, shapes: dict[str, dict[str, Any]], **changes: Any) -> Path:
    """A tiny model whose config.json is changed, in the form of older versions of transformers too."""
    tiny.save(family, folder, shapes)
    document = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in changes:
        document.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(document | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"max_position_embeddings": 64, "rope_parameters": YARN}, 256),  # Qwen 2.5
        ({"max_position_embeddings": 80, "rope_parameters": YARN}, 256),  # Qwen 3, whose range ends after an answer
        ({"max_position_embeddings": 256, "rope_parameters": YARN}, 256),  # DeepSeek V3, gpt-oss
        (
            {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e4},
            256,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": LINEAR}, 256),
        ({"max_position_embeddings": 256, "rope_parameters": LLAMA3}, 256),
    ],
    ids=["yarn", "yarn and a longer range", "yarn, multiplied", "yarn without an original range", "linear", "llama3"],
)
def test_the_context_is_the_scaled_range(tmp_path: Path, changes: dict[str, Any], context: int) -> None:
    folder = save("llama", tmp_path, tiny.FAMILIES, **changes)
    assert load(model_config(folder), lambda stage: None).context == context


def test_a_layer_type_without_scaling_does_not_limit_the_context(tmp_path: Path) -> None:
    """Olmo 3 scales only its layers without a window."""
    shape = tiny.FAMILIES["llama"] | {"sliding_window": 8, "max_position_embeddings": 64}
    shape["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN}
    folder = save("olmo3", tmp_path, {"olmo3": shape}, rope_parameters=rope)
    assert load(model_config(folder), lambda stage: None).context == 256


@pytest.mark.parametrize(
    ("kind", "shapes"), [("fused", tiny.FUSED), ("transformers", tiny.FAMILIES)], ids=["fused", "transformers"]
)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_position_embeddings": 64, "rope_parameters": YARN}, id="yarn"),
        pytest.param({"max_position_embeddings": 64, "rope_parameters": LINEAR}, id="linear", marks=pytest.mark.long),
        pytest.param({"max_position_embeddings": 256, "rope_parameters": LLAMA3}, id="llama3", marks=pytest.mark.long),
    ],
)
async def test_positions_past_the_original_range_equal_generate(
    tmp_path: Path, kind: str, shapes: dict[str, dict[str, Any]], changes: dict[str, Any]
) -> None:
    folder = save("llama", tmp_path, shapes, **changes)
    random = torch.Generator().manual_seed(3)
    lengths = (40, 60, 100, 220)  # before, across and after the original range of 64, up to the end of the context
    prompts = [tuple(torch.randint(tiny.VOCABULARY, (length,), generator=random).tolist()) for length in lengths]
    requests = [GreedyRequest(prompt, 32) for prompt in prompts]
    config = model_config(folder, max_running=4, max_context=256, threads=1)
    with running(config) as engine:
        assert engine.kind == kind
        answers = await generate_concurrently(engine, requests, seed=1)
    assert_answers(answers, reference_answers(folder, requests), requests)
