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

from serve_app.engines.native import calibration

_ALPHA = 0.5


def smooth(model: PreTrainedModel, ids: Seq[int]) -> torch.Tensor:
    """Rescale channels in place, by powers of two, so that no weight is rounded. `ids`: a text to see them on.

    What the channels of its last hidden states are divided by from now on.
    """
    largest = calibration.inputs(model, ids, calibration.largest)
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
    return _smooth_head(model, largest)


def smooth_head(model: PreTrainedModel, ids: Seq[int]) -> torch.Tensor:
    """Only what the head reads, for a model of which only the head is int8."""
    return _smooth_head(model, calibration.inputs(model, ids, calibration.largest))


def _smooth_head(model: PreTrainedModel, largest: dict[torch.nn.Module, torch.Tensor]) -> torch.Tensor:
    head, norm = model.get_output_embeddings(), model.model.norm
    scale = _scale(largest[head], [head])
    norm.weight.data /= scale
    # A weight of its own: it may have been the embedding's, which stays as it is.
    head.weight = torch.nn.Parameter(head.weight.detach() * scale.to(head.weight.dtype), requires_grad=False)
    return scale


def _group(attention: Any) -> int:
    return int(attention.o_proj.in_features // attention.v_proj.out_features)


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
