"""A Llama-like model on CPU in few operations: four packed linears and four native ones a layer.

transformers' modelling code costs 4 to 5 ms a step in dispatch alone, more than the weights of a small model take to
read. This is the same computation over the same weights; packed.py, through the unmodified code, is its reference.
Called one by one from Python the operations cost 1 to 2 ms again, so that the loop over the layers is native too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from serve_app.engines.native.attention import LayerCache
from serve_app.engines.native.linear import (
    DotLinear,
    Int4Linear,
    Int8DotLinear,
    Int8Linear,
    Linear,
    Quantization,
    importance_of,
    of_head,
    pack,
)
from serve_app.engines.native.packed import Computed
from serve_app.engines.native.rows import Rows

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEAD_SIZES = (64, 128)
# Numbers that a native operation takes at a time.
WIDTH = 16

# Rows, and what each is still to be multiplied with. Nothing is to be added to the first layer's rows.
Scaled = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Layer:
    """`window` is how many positions a row looks back on, 0 for all."""

    norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    window: int
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class LeanModel:
    """Holds packed weights of its own; the model that it was made from can go."""

    def __init__(
        self,
        model: PreTrainedModel,
        caches: Seq[LayerCache],
        windows: Seq[int | None],
        quantization: Quantization,
    ) -> None:
        config, length = model.config, caches[0].length
        self._keys, self._values = [cache.keys for cache in caches], [cache.values for cache in caches]
        self._heads = config.num_attention_heads
        self._dim = _head_size(model)
        self._eps = float(config.rms_norm_eps)
        self._int8 = quantization == "int8"
        self._embedding = model.get_input_embeddings().weight.detach()
        self._layers = [
            _layer(layer, window or 0, quantization) for layer, window in zip(model.model.layers, windows, strict=True)
        ]
        self._norm = model.model.norm.weight.detach().float()
        self._head = pack(model.get_output_embeddings().weight, None, of_head(quantization))
        # Layers that take and give floats: rounding between them to bfloat16 would only lose digits.
        floats = self._int8 or isinstance(self._head, DotLinear)
        self._dtype = torch.float32 if floats else model.dtype
        self._cos, self._sin = _rotations(model, length)
        self._native = self._for_native()

    @property
    def weight_bytes(self) -> int:
        """Bytes that one step reads of the linear layers."""
        linears = [linear for y in self._layers for linear in (y.qkv, y.out, y.gate_up, y.down)]
        return sum(linear.weight_bytes for linear in (*linears, self._head))

    def forward(self, rows: Rows) -> Computed:
        """See ForwardPass."""
        slots, positions = torch.tensor(rows.slots), torch.tensor(rows.positions)
        headed = len(rows.sample_rows) + len(rows.logprob_rows)
        wanted = torch.tensor([*rows.sample_rows, *rows.logprob_rows, *rows.embedding_rows], dtype=torch.long)
        x = F.embedding(torch.tensor(rows.tokens), self._embedding).to(self._dtype)
        if self._native is None:
            normed = self.layers(x, slots, positions, wanted)
        else:
            normed = torch.ops.serve_app.layers(
                x, *self._native, self._heads, self._eps, self._cos, self._sin, slots, positions, wanted,
                self._keys, self._values,
            )  # fmt: skip
        states, scale = normed
        count = len(wanted)
        hidden = states[headed:count]
        if scale is not None:
            hidden, scale = hidden * scale[headed:, None], scale[:headed]
        if rows.embedding_rows:
            states = torch.cat([states[:headed], states[count:]])
        return Computed(self._logits(states, scale) if headed else x.new_empty(0, self._head.out_features), hidden)

    def layers(
        self, x: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All layers, for linear layers that the native loop does not know, and as its reference.

        What the head reads of the wanted rows, and what that is still to be multiplied with.
        """
        native = torch.ops.serve_app
        y: Scaled = (None, None)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            qkv, scale = layer.qkv.scaled(*self._normed(x, y, layer.norm))
            native.rope_store(
                qkv, scale, self._heads, self._cos, self._sin, layer.query_norm, layer.key_norm, self._eps,
                slots, positions, keys, values,
            )  # fmt: skip
            if layer is self._layers[-1]:
                # Whatever is not sampled from has done its part when its keys and values are kept.
                x, qkv, slots, positions = x[wanted], qkv[wanted], slots[wanted], positions[wanted]
            attended, scale = self._room(x.shape[0], self._heads * self._dim)
            native.attend(
                qkv, self._heads, self._dim**-0.5, layer.window, slots, positions, keys, values,
                attended, scale,
            )  # fmt: skip
            y = layer.out.scaled(attended, scale)
            gate_up, scale = layer.gate_up.scaled(*self._normed(x, y, layer.mlp_norm))
            active, active_scale = self._room(x.shape[0], gate_up.shape[1] // 2)
            native.silu_mul(gate_up, scale, active, active_scale)
            y = layer.down.scaled(active, active_scale)
        return self._normed(x, y, self._norm)

    def _logits(self, states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        logits, left = self._head.scaled(states, scale)
        return logits if left is None else logits[:-1].mul_(left[:, None])

    def _for_native(self) -> tuple[Any, ...] | None:
        """What the native loop needs of the layers, in its order; None if it does not know one of them."""
        linears = [linear for layer in self._layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        (kind, *others) = {type(linear) for linear in linears}
        if others:
            return None
        weights = [linear.weight for linear in linears]
        return (
            [norm for layer in self._layers for norm in (layer.norm, layer.mlp_norm)] + [self._norm],
            [] if kind is Int8Linear else weights,
            [linear.lines for linear in linears if isinstance(linear, Int4Linear | Int8DotLinear)],
            [linear.bias for linear in linears],
            weights if kind is Int8Linear else [],
            [layer.query_norm for layer in self._layers],
            [layer.key_norm for layer in self._layers],
            [layer.window for layer in self._layers],
        )

    def _room(self, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where an operation writes what a linear layer reads."""
        if not self._int8:
            return torch.empty(rows, width, dtype=self._dtype), None
        return torch.empty(rows + 1, width), torch.empty(rows)

    def _normed(self, x: torch.Tensor, y: Scaled, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x += y, and the norm of that."""
        out, scale = self._room(*x.shape)
        torch.ops.serve_app.add_norm(x, *y, weight, self._eps, out, scale)
        return out, scale


def why_not(model: PreTrainedModel) -> str | None:
    """Why this model cannot run lean; None if it can."""
    config = model.config
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        return f"{model.dtype} on {model.device}"
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not one of {', '.join(FAMILIES)}"
    if _head_size(model) not in HEAD_SIZES or config.hidden_size % WIDTH or config.intermediate_size % WIDTH:
        return f"heads of {_head_size(model)}, rows of {config.hidden_size} and {config.intermediate_size}"
    if config.hidden_act != "silu":
        return f"{config.hidden_act} between its layers"
    return None


def _head_size(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _layer(layer: Any, window: int, quantization: Quantization) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        norm=_weight(layer.input_layernorm),
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj], quantization),
        query_norm=_weight(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_weight(attention.k_norm) if hasattr(attention, "k_norm") else None,
        window=window,
        out=_joined([attention.o_proj], quantization),
        mlp_norm=_weight(layer.post_attention_layernorm),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj], quantization),
        down=_joined([mlp.down_proj], quantization),
    )


def _weight(norm: Any) -> torch.Tensor:
    weight: torch.Tensor = norm.weight.detach().float()
    return weight


def _joined(linears: Seq[torch.nn.Linear], quantization: Quantization) -> Linear:
    """Layers of one input as one."""
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return pack(weight, bias, quantization, importance_of(linears[0]))


def _rotations(model: PreTrainedModel, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[length, dim / 2]` by the model's own rotary embedding, whatever its scaling is."""
    rotary: Any = model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
