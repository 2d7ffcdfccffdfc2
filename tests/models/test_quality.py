"""What each precision costs, on a text: likeness to float32 of every next-token distribution."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from serve_app.engine.loader import load
from serve_app.engine.rows import span
from serve_app.engine.runner import TorchRunner
from serve_app.engine.smooth import smooth
from serve_app.types import TextPrompt
from tests.models import tiny
from tests.models.crowd import model_config

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

PROSE = Path(__file__).with_name("prose.txt").read_text()


class Quality(NamedTuple):
    top1: float
    kl: float
    perplexity: float
    weight_mib: float


def read(dtype: str, quantization: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log-probabilities `[N, V]` after every token of the text, its ids, and the weights' MiB."""
    model = model_config("builtin:smollm2-135m", max_running=2, max_context=1024)
    model = model.model_copy(update={"dtype": dtype, "quantization": quantization})
    runner = TorchRunner(load(model, lambda stage: None), model.engine, model.quantization)
    assert runner.kind == "lean"
    (ids,) = runner.text.encode([TextPrompt(PROSE)])
    assert isinstance(ids, list)
    rows = span(ids, slot=0, start=0)
    rows.wanted[:] = range(len(ids))
    with torch.inference_mode():
        logprobs = runner._model.forward(rows).float().log_softmax(-1)
    return logprobs, torch.tensor(ids), runner.weight_bytes / 2**20


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, torch.Tensor, float]:
    return read("float32", "none")


def compare(exact: torch.Tensor, ids: torch.Tensor, other: torch.Tensor, weight_mib: float) -> Quality:
    said = other[:-1].gather(1, ids[1:, None])
    return Quality(
        top1=(exact.argmax(-1) == other.argmax(-1)).float().mean().item(),
        kl=(exact.exp() * (exact - other)).sum(-1).mean().item(),
        perplexity=(-said.mean()).exp().item(),
        weight_mib=weight_mib,
    )


@pytest.mark.parametrize(
    ("dtype", "quantization", "top1", "kl"), [("bfloat16", "none", 0.97, 0.003), ("bfloat16", "int8", 0.90, 0.03)]
)
def test_precision(
    exact: tuple[torch.Tensor, torch.Tensor, float], dtype: str, quantization: str, top1: float, kl: float
) -> None:
    reference, ids, mib = exact
    other, _, other_mib = read(dtype, quantization)
    best, quality = compare(reference, ids, reference, mib), compare(reference, ids, other, other_mib)
    print(f"\n{len(ids)} positions; float32 {best}; {dtype} {quantization} {quality}")
    assert quality.top1 >= top1
    assert quality.kl <= kl
    assert quality.perplexity <= best.perplexity * 1.05


def test_int8_rows_do_not_depend_on_an_outlier_beside_them() -> None:
    from serve_app.engine.linear import Int8Linear

    noise = torch.Generator().manual_seed(0)
    layer = Int8Linear(torch.randn(48, 64, generator=noise), torch.randn(48, generator=noise))
    rows = torch.randn(5, 64, generator=noise)
    alone = torch.cat([layer(row[None]) for row in rows])
    rows[2] *= 1e6
    beside = layer(rows)
    for row in (0, 1, 3, 4):
        assert torch.equal(beside[row], alone[row])


@pytest.mark.parametrize("family", tiny.LEAN)
def test_smoothing_changes_nothing_but_the_ranges(family: str, tmp_path: Path) -> None:
    """By powers of two: every logit stays what it was, up to the order of sums."""
    loaded = load(model_config(tiny.save(family, tmp_path, tiny.LEAN)), lambda stage: None)
    ids = list(range(1, 60))
    with torch.inference_mode():
        before = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        weight = loaded.model.model.layers[0].mlp.down_proj.weight.clone()
        smooth(loaded.model, ids)
        after = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        assert not torch.equal(loaded.model.model.layers[0].mlp.down_proj.weight, weight)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("family", tiny.LEAN)
def test_int8_runs_lean_and_close_to_what_it_was(family: str, tmp_path: Path) -> None:
    """Random weights have no outliers; biases, head norms and windows take their own way through int8."""
    folder = tiny.save(family, tmp_path, tiny.LEAN)
    rows = span(list(range(1, 41)), slot=0, start=0)
    outputs = []
    for quantization in ("none", "int8"):
        model = model_config(folder, max_running=2, max_context=64).model_copy(update={"quantization": quantization})
        runner = TorchRunner.from_config(model, lambda stage: None)
        assert runner.kind == "lean"
        with torch.inference_mode():
            outputs.append(runner._model.forward(rows)[0].float())
    exact, rounded = outputs
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.95
