"""Quality of each precision on a text: next-token distributions compared with float32. Quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from serve_app.core.requests import TextPrompt
from serve_app.engines.native import int4, kernels
from serve_app.engines.native.families import separate_projections
from serve_app.engines.native.linear import (
    DotProductLinear,
    FbgemmInt8Linear,
    Int4DotProductLinear,
    Int8DotProductLinear,
    pack,
)
from serve_app.engines.native.loader import load
from serve_app.engines.native.preparation import prepare
from serve_app.engines.native.rows import span
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.native.smooth import smooth
from tests.models import tiny
from tests.models.concurrent_load import model_config

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

PROSE = Path(__file__).with_name("prose.txt").read_text()


class Quality(NamedTuple):
    top1: float
    kl: float
    perplexity: float
    weight_mib: float


def logprobs_of(
    dtype: str, quantization: str, change: Callable[[PreTrainedModel], None] = lambda model: None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log probabilities `[N, V]` after each token of the text, the token ids, and the size of the weights in MiB."""
    model = model_config("builtin:smollm2-135m", max_running=2, max_context=1024)
    model = model.model_copy(update={"dtype": dtype, "quantization": quantization})
    loaded = load(model, lambda stage: None)
    change(loaded.model)
    runner = TorchRunner(prepare(loaded, model.quantization), model.native_options)
    assert runner.kind == "fused"
    (ids,) = runner.text.encode([TextPrompt(PROSE)])
    assert isinstance(ids, list)
    rows = span(ids, slot=0, start=0)
    rows.sample_rows[:] = range(len(ids))
    with torch.inference_mode():
        logprobs = runner._model.forward(rows).logits.float().log_softmax(-1)
    return logprobs, torch.tensor(ids), runner.weight_bytes / 2**20


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, torch.Tensor, float]:
    return logprobs_of("float32", "none")


def compare(exact: torch.Tensor, ids: torch.Tensor, other: torch.Tensor, weight_mib: float) -> Quality:
    of_text = other[:-1].gather(1, ids[1:, None])
    return Quality(
        top1=(exact.argmax(-1) == other.argmax(-1)).float().mean().item(),
        kl=(exact.exp() * (exact - other)).sum(-1).mean().item(),
        perplexity=(-of_text.mean()).exp().item(),
        weight_mib=weight_mib,
    )


@pytest.mark.parametrize(
    ("dtype", "quantization", "top1", "kl"),
    [
        ("bfloat16", "none", 0.97, 0.002),
        ("bfloat16", "int8", 0.90, 0.03),
        pytest.param("bfloat16", "int4", 0.89, 0.03, marks=pytest.mark.long),
    ],
)
def test_the_loss_of_quality_is_small(
    exact: tuple[torch.Tensor, torch.Tensor, float], dtype: str, quantization: str, top1: float, kl: float
) -> None:
    """This favours int4, because the checkpoint has groups of 32 weights on 16 levels. The next test does not."""
    reference, ids, mib = exact
    other, _, other_mib = logprobs_of(dtype, quantization)
    best, quality = compare(reference, ids, reference, mib), compare(reference, ids, other, other_mib)
    print(f"\n{len(ids)} positions; float32 {best}; {dtype} {quantization} {quality}")
    assert quality.top1 >= top1
    assert quality.kl <= kl
    assert quality.perplexity <= best.perplexity * 1.05


@pytest.mark.long
def test_the_loss_of_quality_by_int4_is_small_for_shuffled_weights(
    exact: tuple[torch.Tensor, torch.Tensor, float],
) -> None:
    """The same model with its channels in another order: it computes the same, and no group has 16 levels."""
    reference, ids, mib = exact
    same, _, _ = logprobs_of("float32", "none", shuffle)
    assert compare(reference, ids, same, mib).kl < 1e-6
    other, _, other_mib = logprobs_of("bfloat16", "int4", shuffle)
    best, quality = compare(reference, ids, reference, mib), compare(reference, ids, other, other_mib)
    print(f"\n{len(ids)} positions; shuffled bfloat16 int4 {quality}")
    assert quality.top1 >= 0.84
    assert quality.kl <= 0.07
    assert quality.perplexity <= best.perplexity * 1.08


@torch.no_grad()
def shuffle(model: Any) -> None:
    """Change the order of the channels between the layers, within each MLP and within each value head, in place."""
    noise = torch.Generator().manual_seed(0)
    config = model.config
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    order = torch.randperm(hidden, generator=noise)
    for weight in (model.model.embed_tokens.weight, model.model.norm.weight):  # the head's is the embedding's
        weight.copy_(weight[..., order])
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        consumers = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        for module in (layer.input_layernorm, layer.post_attention_layernorm, *consumers):
            module.weight.copy_(module.weight[..., order])
        for module in (attention.o_proj, mlp.down_proj):
            module.weight.copy_(module.weight[order])
        inside, within = torch.randperm(inner, generator=noise), torch.randperm(dim, generator=noise)
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[inside])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[inside])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inside])
        values, out = attention.v_proj.weight, attention.o_proj.weight
        values.copy_(values.view(-1, dim, hidden)[:, within].reshape(values.shape))
        out.copy_(out.view(hidden, -1, dim)[:, :, within].reshape(out.shape))


Make = Callable[[torch.Tensor, torch.Tensor | None], torch.nn.Module]

every_quantized = pytest.mark.parametrize(
    "make",
    [partial(pack, quantization="int8"), FbgemmInt8Linear, partial(Int4DotProductLinear, importance=None)],
    ids=["int8", "int8 by fbgemm", "int4"],
)


def test_pack_chooses_the_fastest_layer_of_the_processor() -> None:
    assert kernels.available(lambda stage: None)
    for outputs in (48, 20):
        weight = torch.randn(outputs, 64)
        assert type(pack(weight, None, "int8")) is Int8DotProductLinear
        assert type(pack(weight.bfloat16(), None, "none")) is DotProductLinear
    assert type(pack(torch.randn(16, 42), None, "int8")) is FbgemmInt8Linear


@every_quantized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_rows_do_not_depend_on_an_outlier_in_another_row(make: Make, dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(0)
    layer = make(torch.randn(48, 64, generator=noise), torch.randn(48, generator=noise))
    rows = torch.randn(5, 64, generator=noise).to(dtype)
    alone = torch.cat([layer(row[None]) for row in rows])
    rows[2] *= 1e6
    beside = layer(rows)
    for row in (0, 1, 3, 4):
        assert torch.equal(beside[row], alone[row])


@every_quantized
def test_a_quantized_row_does_not_depend_on_the_number_of_rows(make: Make) -> None:
    """Row counts of decode steps and of prompt chunks, and 0."""
    noise = torch.Generator().manual_seed(1)
    layer = make(torch.randn(80, 96, generator=noise), None)
    rows = torch.randn(70, 96, generator=noise).to(torch.bfloat16)
    alone = torch.cat([layer(row[None]) for row in rows])
    for count in (0, 1, 2, 3, 4, 5, 8, 31, 33, 70):
        assert torch.equal(layer(rows[None, :count])[0], alone[:count])


def test_a_row_that_is_multiplied_twice_does_not_depend_on_others() -> None:
    """The remainder of a number halfway between two steps of 7 bits may be one ulp above 1."""
    noise = torch.Generator().manual_seed(3)
    layer = FbgemmInt8Linear(torch.randn(80, 96, generator=noise), None)
    layer.multiply_twice = True  # as on a processor without AVX512-VNNI
    middles = (torch.arange(-63, 63) + 0.5) / 63.5
    rows = middles[torch.randint(0, 126, (60, 96), generator=noise)]
    rows[::2] *= torch.rand(30, 1, generator=noise)
    rows[:, 0] = 1  # the scale of each row
    assert torch.equal(layer(rows), torch.cat([layer(row[None]) for row in rows]))


def test_weights_that_are_not_whole_groups_become_int8() -> None:
    weight, x = torch.randn(48, 40), torch.randn(3, 40)
    layer = pack(weight, None, "int4")
    assert isinstance(layer, FbgemmInt8Linear | Int8DotProductLinear)
    y = layer(x)
    assert torch.cosine_similarity(y, x @ weight.T).min() > 0.999


def test_int4_dequantizes_by_its_formula_and_follows_the_importance() -> None:
    noise = torch.Generator().manual_seed(2)
    weight = torch.randn(48, 64, generator=noise)
    importance = torch.ones(64)
    importance[::8] = 1000.0
    errors = []
    for channels in (None, importance):
        levels, multipliers, offsets, scales = int4.quantize(weight, channels)
        dequantized = ((levels * multipliers).div(8, rounding_mode="floor") + offsets).flatten(1) * scales[:, None]
        assert 0 <= int(levels.min()) <= int(levels.max()) <= 15
        layer = Int4DotProductLinear(weight, None, channels)
        assert torch.allclose(layer(torch.eye(64)).T, dequantized, rtol=1e-6, atol=0)
        errors.append((dequantized - weight)[:, ::8].square().mean())
    assert errors[1] < errors[0] / 2
    constant = int4.quantize(torch.full((16, 32), 0.5), None)
    assert torch.allclose(constant.integers * constant.scales[:, None], torch.tensor(0.5))


@pytest.mark.parametrize("family", tiny.FUSED)
def test_smoothing_does_not_change_the_logits(family: str, tmp_path: Path) -> None:
    """The factors are powers of two, so that the logits change by the order of sums only."""
    loaded = load(model_config(tiny.save(family, tmp_path, tiny.FUSED)), lambda stage: None)
    separate_projections(loaded.model)
    enlarge_channels(loaded.model)
    ids = list(range(1, 60))
    weights = [*(layer.self_attn.o_proj for layer in loaded.model.model.layers), loaded.model.lm_head]
    weights += [layer.mlp.down_proj for layer in loaded.model.model.layers if hasattr(layer.mlp, "down_proj")]
    with torch.inference_mode():
        before = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        old = [linear.weight.clone() for linear in weights]
        smooth(loaded.model, ids)
        after = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits
    assert not any(torch.equal(linear.weight, weight) for linear, weight in zip(weights, old, strict=True))
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@torch.no_grad()
def enlarge_channels(model: Any) -> None:
    """Some channels of the activations become large, as in trained models: those of random weights are all alike."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "up_proj"):  # smoothing does not change experts
            layer.mlp.up_proj.weight[::16] *= 30
        layer.self_attn.v_proj.weight[::16] *= 30
        for norm in (layer.post_attention_layernorm, getattr(layer, "input_layernorm", None)):
            if norm is not None:
                norm.weight[::16] += 30
    model.model.norm.weight[::16] += 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", tiny.every([*tiny.FUSED, "gpt2", "qwen2_moe"], ["qwen2", "qwen3", "gpt2"]))
def test_a_quantized_model_is_close_to_the_unquantized_one(
    family: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    """Covers biases, head norms, windows and the Hugging Face path. Random weights have no outliers.

    On three layers with random weights int4 loses much, so that only the median over the positions is compared.
    """
    folder = tiny.save(family, tmp_path, tiny.FAMILIES | tiny.FUSED)
    exact, rounded = (chunked(folder, dtype, wanted, family in tiny.FUSED) for wanted in ("none", quantization))
    likeness = torch.cosine_similarity(exact, rounded, dim=-1)
    assert likeness.median() > (0.95 if quantization == "int8" else 0.6)


def chunked(folder: Path, dtype: str, quantization: str, fused: bool) -> torch.Tensor:
    """Logits of the second chunk of a prompt; the first chunk returns none."""
    model = model_config(folder, max_running=2, max_context=64)
    model = model.model_copy(update={"quantization": quantization, "dtype": dtype})
    loaded = load(model, lambda stage: None)
    if not fused:
        loaded.model.config.model_type = "not supported by the fused path"
    runner = TorchRunner(prepare(loaded, model.quantization), model.native_options)
    assert runner.kind == ("fused" if fused else "transformers")
    first, second = span(list(range(1, 31)), slot=0, start=0), span(list(range(31, 51)), slot=0, start=30)
    first.sample_rows.clear()
    second.sample_rows[:] = range(20)
    with torch.inference_mode():
        assert len(runner._model.forward(first).logits) == 0
        return runner._model.forward(second).logits.float()
