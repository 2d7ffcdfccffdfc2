"""Makes a Llama-like model's activations easier to quantise, without changing what it computes.

A few channels of a transformer's activations are many times larger than the rest, and 8 bits shared by a row are then
spent on them. Dividing such a channel where it is made, and multiplying the weights that read it, moves the range to
the weights, which have a scale for every output (SmoothQuant: Xiao et al. 2023, arXiv 2211.10438, alpha 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from transformers import PreTrainedModel

# Read once to see which channels are large. Which they are hardly depends on the text.
TEXT = (
    "Question: A train leaves at 9:40 and arrives at 12:05. How long is the journey?\nAnswer: 2 hours 25 minutes.\n\n"
    "def area(width, height):\n    return width * height\n\nThe river froze in January, and by the end of the "
    "people crossed it on foot. «Wie weit ist es noch?», fragte sie; nobody answered. Dear Sir or Madam, thank you "
    "for your letter of 3 May. 1. Mix the flour with two eggs. 2. Add 250 ml of milk."
)
_ALPHA = 0.5


def smooth(model: PreTrainedModel, ids: Seq[int]) -> None:
    """Rescale channels in place, by powers of two, so that no weight is rounded. `ids`: TEXT in the model's tokens."""
    largest = _largest_inputs(model, ids)
    layers: Any = model.model.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ):
            scale = _scale(largest[readers[0]], readers)
            norm.weight.data /= scale
            _read(readers, scale)
        scale = _scale(largest[mlp.down_proj], [mlp.down_proj])
        _make(mlp.up_proj, scale)
        _read([mlp.down_proj], scale)
        shared = attention.v_proj.out_features
        # The query heads of one group read the same value head, so they share its scale.
        grouped = _scale(largest[attention.o_proj], [attention.o_proj]).view(-1, _group(attention), attention.head_dim)
        scale = grouped.amax(1)
        _make(attention.v_proj, scale.reshape(shared))
        _read([attention.o_proj], scale[:, None].expand_as(grouped).reshape(-1))


def _group(attention: Any) -> int:
    return int(attention.o_proj.in_features // attention.v_proj.out_features)


def _largest_inputs(model: PreTrainedModel, ids: Seq[int]) -> dict[torch.nn.Module, torch.Tensor]:
    """The largest magnitude of every input channel of every linear layer."""
    largest: dict[torch.nn.Module, torch.Tensor] = {}

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        largest[module] = inputs[0].detach().float().abs().flatten(0, -2).amax(0)

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [linear.register_forward_hook(look) for linear in linears]
    model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return largest


def _scale(largest: torch.Tensor, readers: Seq[torch.nn.Linear]) -> torch.Tensor:
    """What each channel is divided by where it is made."""
    weights = torch.stack([reader.weight.detach().float().abs().amax(0) for reader in readers]).amax(0)
    ratio = largest.clamp_min(1e-5) ** _ALPHA / weights.clamp_min(1e-5) ** (1 - _ALPHA)
    return torch.exp2(torch.round(torch.log2(ratio)))


def _make(linear: torch.nn.Linear, scale: torch.Tensor) -> None:
    linear.weight.data /= scale.to(linear.weight.dtype)[:, None]
    if linear.bias is not None:
        linear.bias.data /= scale.to(linear.bias.dtype)


def _read(linears: Seq[torch.nn.Linear], scale: torch.Tensor) -> None:
    for linear in linears:
        linear.weight.data *= scale.to(linear.weight.dtype)
