"""Rescales the channels of a Llama-like model for quantization of its activations; the model's outputs stay the same.

A few channels of a transformer's activations are many times larger than the others, and take most of the 8 bits that a
row shares. This module divides such a channel in the layer that produces it and multiplies the weights that consume it.
The weights have a scale for each output and can carry the range (SmoothQuant: Xiao et al. 2023, arXiv 2211.10438).
SmoothQuant rescales every channel by its range and its weights. Here only large channels are divided, by the square
root of their excess: of the other channels, the groups of int4 keep their ranges. Each layer keeps the scales of its
channels as `serve_app_input_scale` and `serve_app_output_scale`, for the LoRA adapters of the unchanged model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from transformers import PreTrainedModel

from serve_app.engines.native import calibration
from serve_app.engines.native.families import family_of

# A channel is large if its range is so many times that of the median one. KL of the embedded model with its channels
# shuffled, in int8 and int4: 0.014 and 0.065 with 2, 0.014 and 0.066 with 3, 0.017 and 0.069 with 4, 0.024 and 0.075
# with 8; by SmoothQuant's rule with alpha 0.5: 0.015 and 0.088.
_LARGE = 3.0


def smooth(model: PreTrainedModel, ids: Seq[int]) -> torch.Tensor:
    """Rescale channels in place, by powers of two, so that no weight is rounded. `ids` is the calibration text.

    Returns the divisors `[hidden]` of the channels of the last hidden states.
    """
    ranges = calibration.input_statistics(model, ids, calibration.max_magnitude)
    layers: Any = model.model.layers
    family = family_of(model)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        consumers_of = [(family.attention_norm, [attention.q_proj, attention.k_proj, attention.v_proj])]
        dense = not hasattr(mlp, "experts")  # a router and all experts would consume the channels
        if dense:
            consumers_of.append((family.mlp_norm, [mlp.gate_proj, mlp.up_proj]))
        for norm, consumers in consumers_of:
            if norm is None:
                continue  # the channels are those of the residual stream
            scale = _scale(ranges[consumers[0]])
            family.divide(layer.get_submodule(norm), scale)
            _multiply_inputs(consumers, scale)
        if dense:
            scale = _scale(ranges[mlp.down_proj])
            _divide_outputs(mlp.up_proj, scale)
            _multiply_inputs([mlp.down_proj], scale)
        # The query heads of one group read the same value head, so they share its scale.
        grouped = _scale(ranges[attention.o_proj]).view(-1, _group(attention), attention.head_dim)
        scale = grouped.amax(1)
        _divide_outputs(attention.v_proj, scale.reshape(attention.v_proj.out_features))
        _multiply_inputs([attention.o_proj], scale[:, None].expand_as(grouped).reshape(-1))
    return _smooth_head(model, ranges)


def _smooth_head(model: PreTrainedModel, ranges: dict[torch.nn.Module, torch.Tensor]) -> torch.Tensor:
    head = model.get_output_embeddings()
    scale = _scale(ranges[head])
    family_of(model).divide(model.model.norm, scale)
    # A new parameter: the head may share its weight with the embedding, which must not change.
    head.weight = torch.nn.Parameter(head.weight.detach() * scale.to(head.weight.dtype), requires_grad=False)
    return scale


def _group(attention: Any) -> int:
    """Query heads per key-value head."""
    return int(attention.o_proj.in_features // attention.v_proj.out_features)


def _scale(range_: torch.Tensor) -> torch.Tensor:
    """The divisor of each channel `[K]`, a power of two. `range_` holds the channels' largest magnitudes."""
    excess = range_ / (_LARGE * range_.median()).clamp_min(1e-12)
    return torch.exp2(torch.round(torch.log2(excess.clamp_min(1)) / 2))


def _divide_outputs(linear: torch.nn.Linear, scale: torch.Tensor) -> None:
    linear.serve_app_output_scale = scale
    linear.weight.data /= scale.to(linear.weight.dtype)[:, None]
    if linear.bias is not None:
        linear.bias.data /= scale.to(linear.bias.dtype)


def _multiply_inputs(linears: Seq[torch.nn.Linear], scale: torch.Tensor) -> None:
    for linear in linears:
        linear.serve_app_input_scale = scale
        linear.weight.data *= scale.to(linear.weight.dtype)
