"""The fused CPU path: a Llama-like model in four linear layers and four native operations per layer.

The dispatch of transformers' modelling code costs 4 to 5 ms a step, longer than it takes to read the weights of a small
model. This module computes the same from the same weights; its reference is transformers_path.py. Calls of the
operations from Python would cost 1 to 2 ms a step, so that the loop over the layers is native as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import Any

import torch
import torch.nn.functional as F

from serve_app.engines.files.adapter_files import AdapterFiles
from serve_app.engines.native.attention import LayerCache
from serve_app.engines.native.forward import ForwardOutput, LayerShape, SelfTest
from serve_app.engines.native.fused_weights import Experts, FusedWeights, Mlp
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.native.linear import Linear
from serve_app.engines.native.lora import STRIP, LoraWeights, RowGroups, Target, make_weights, wanted_groups
from serve_app.engines.native.rows import Rows

_PROJECTIONS = 7

# Rows for a linear layer, and what quantized ones are to be multiplied by: see Int8DotProductLinear.
Scaled = tuple[torch.Tensor, torch.Tensor | None]


class FusedModel:
    """A forward pass with packed weights and a KV cache of one LayerCache per layer."""

    def __init__(self, weights: FusedWeights, caches: Seq[LayerCache]) -> None:
        self._weights = weights
        self._keys, self._values = [cache.keys for cache in caches], [cache.values for cache in caches]
        self._heads = weights.heads
        self._dim = weights.head_size
        self._eps = weights.eps
        self._quantized = weights.quantization != "none"
        self.targets = weights.targets
        self._embedding = weights.embedding
        self._layers = weights.layers
        self._norm = weights.norm
        self._head = weights.head
        # Adapters are about as precise as the model's own weights.
        self._adapter_dtype = weights.dtype if weights.quantization == "none" else torch.int8
        self._widths = _output_widths(self.targets)
        self._numbers = weights.numbers
        tables = [rotary.tables(caches[0].length) for rotary in weights.rotaries]
        self._cos, self._sin = [cos for cos, _ in tables], [sin for _, sin in tables]
        self._arguments = self._native_arguments()

    @property
    def weight_bytes(self) -> int:
        """Bytes that one step reads of the linear layers."""
        return sum(linear.weight_bytes for linear in self._weights.linears)

    def make_adapter(self, files: AdapterFiles) -> LoraWeights:
        """See ForwardPass."""
        return make_weights(files, self.targets, self._adapter_dtype)

    def forward(self, rows: Rows) -> ForwardOutput:
        """See ForwardPass."""
        slots, positions = torch.tensor(rows.slots), torch.tensor(rows.positions)
        logit_rows = len(rows.sample_rows) + len(rows.logprob_rows)
        numbers = [*rows.sample_rows, *rows.logprob_rows, *rows.embedding_rows]
        wanted = torch.tensor(numbers, dtype=torch.long)
        groups = RowGroups.of(rows.adapters)
        last_groups = RowGroups.of(wanted_groups(rows.adapters, numbers)) if rows.adapters else groups
        x = F.embedding(torch.tensor(rows.tokens), self._embedding).float() * self._numbers.embedding_scale
        if self._arguments is None:
            normed = self.layers(x, slots, positions, wanted, groups, last_groups)
        else:
            normed = torch.ops.serve_app.layers(
                x, *self._arguments, self._cos, self._sin, slots, positions, wanted,
                self._keys, self._values, *_native(groups), *_native(last_groups), self._widths,
            )  # fmt: skip
        states, scale = normed
        count = len(wanted)
        hidden = states[logit_rows:count]
        if scale is not None:
            hidden, scale = hidden * scale[logit_rows:, None], scale[:logit_rows]
        if rows.embedding_rows:
            states = torch.cat([states[:logit_rows], states[count:]])
        logits = self._logits(states, scale) if logit_rows else x.new_empty(0, self._head.out_features)
        return ForwardOutput(logits, hidden)

    def _logits(self, states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        logits, cap = self._head.scaled(states, scale), self._numbers.logits_cap
        if self._numbers.logits_scale != 1:
            logits *= self._numbers.logits_scale
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def layers(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor,
        groups: RowGroups,
        last_groups: RowGroups,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loop over the layers in Python: for linear layers that the native loop does not support, and for tests.

        The rows of `groups` use adapters, and of the wanted rows those of `last_groups`. Returns the head's input for
        the wanted rows, and the multipliers that are still to be applied to it.
        """
        native, numbers = torch.ops.serve_app, self._numbers
        y, y_norm = None, None
        for number, (layer, keys, values) in enumerate(zip(self._layers, self._keys, self._values, strict=True)):
            qkv = self._linear(layer.qkv, self._norm_of_sum(x, y, y_norm, layer.norm), groups, 4 * number)
            native.rope_store(
                qkv, self._heads, self._cos[layer.rotary], self._sin[layer.rotary], layer.query_norm, layer.key_norm,
                self._eps, slots, positions, keys, values,
            )  # fmt: skip
            if layer is self._layers[-1]:
                # The other rows are complete when their keys and values are stored.
                x, qkv, slots, positions = x[wanted], qkv[wanted], slots[wanted], positions[wanted]
                groups = last_groups
            attended = self._buffer(x.shape[0], self._heads * self._dim)
            native.attend(
                qkv, self._heads, numbers.score_scale, numbers.score_cap, layer.window, slots, positions, keys, values,
                *attended,
            )  # fmt: skip
            y = self._linear(layer.out, attended, groups, 4 * number + 1)
            normed = self._norm_of_sum(x, y, layer.attended_norm, layer.mlp_norm)
            if isinstance(layer.mlp, Mlp):
                y = self._mlp(layer.mlp, normed, groups, 4 * number + 2)
            else:
                y = self._experts(layer.mlp, *normed)
            y_norm = layer.mlp_result_norm
        return self._norm_of_sum(x, y, y_norm, self._norm)

    def _linear(self, linear: Linear, rows: Scaled, groups: RowGroups, number: int) -> torch.Tensor:
        """The result of a layer, number `number` of the model, with what the adapters of its rows add to it."""
        y = linear.scaled(*rows)
        if groups.adapters:
            torch.ops.serve_app.add_lora(y, *rows, *_native(groups), self._widths, number)
        return y

    def _mlp(self, mlp: Mlp, rows: Scaled, groups: RowGroups, number: int) -> torch.Tensor:
        gate_up = self._linear(mlp.gate_up, rows, groups, number)
        active = self._buffer(gate_up.shape[0], gate_up.shape[1] // 2)
        torch.ops.serve_app.gated(gate_up, self._numbers.gelu, *active)
        return self._linear(mlp.down, active, groups, number + 1)

    def _experts(self, block: Experts, rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The results of the chosen experts; the rows of each expert are computed together."""
        exact = rows if scale is None else rows * scale[:, None]
        probabilities, chosen = block.router.scaled(exact, None).softmax(-1).topk(block.top)
        if block.normalised:
            probabilities /= probabilities.sum(-1, keepdim=True)
        y, none = torch.zeros_like(rows), RowGroups.of([])
        for number, expert in enumerate(block.experts):
            found, places = (chosen == number).nonzero(as_tuple=True)
            if len(found):
                part = rows[found], None if scale is None else scale[found]
                y.index_add_(0, found, self._mlp(expert, part, none, 0) * probabilities[found, places][:, None])
        if block.shared is not None and block.shared_gate is not None:
            shared = self._mlp(block.shared, (rows, scale), none, 0)
            y += shared * block.shared_gate.scaled(exact, None).sigmoid()
        return y

    def _native_arguments(self) -> tuple[Any, ...] | None:
        """The arguments of the native loop that do not change."""
        linears = [linear for layer in self._layers for linear in layer.linears]
        numbers, mlps = self._numbers, [layer.mlp for layer in self._layers]
        return (
            [norm for layer in self._layers for norm in layer.norms] + [self._norm],
            [linear.weight for linear in linears],
            [getattr(linear, "scales", None) for linear in linears],
            [linear.bias for linear in linears],
            [layer.query_norm for layer in self._layers],
            [layer.key_norm for layer in self._layers],
            [layer.rotary for layer in self._layers],
            [layer.window for layer in self._layers],
            self._heads,
            self._eps,
            numbers.score_scale,
            numbers.score_cap,
            numbers.residual,
            numbers.gelu,
            [len(mlp.experts) if isinstance(mlp, Experts) else 0 for mlp in mlps],
            any(isinstance(mlp, Experts) and mlp.shared is not None for mlp in mlps),
            max((mlp.top for mlp in mlps if isinstance(mlp, Experts)), default=0),
            any(isinstance(mlp, Experts) and mlp.normalised for mlp in mlps),
        )

    def _buffer(self, rows: int, width: int) -> Scaled:
        """The output tensors of an operation whose result is the input of a linear layer."""
        return torch.empty(rows, width), torch.empty(rows) if self._quantized else None

    def _norm_of_sum(
        self, x: torch.Tensor, y: torch.Tensor | None, y_norm: torch.Tensor | None, norm: torch.Tensor | None
    ) -> Scaled:
        """x += y in place, after y's own norm; returns the norm of x. A norm that is None changes nothing."""
        normed = self._buffer(*x.shape)
        torch.ops.serve_app.add_norm(x, y, y_norm, self._numbers.residual, norm, self._eps, *normed)
        return normed


@torch.inference_mode()
def fused_fault(weights: FusedWeights, shapes: Seq[LayerShape], test: SelfTest) -> str | None:
    """What is wrong with the logits that the fused path computes with these weights; None if nothing is."""
    caches = [LayerCache(1, s.heads, BLOCK, s.key_dim, s.value_dim, weights.dtype, s.device) for s in shapes]
    return test.fault(FusedModel(weights, caches), weights.quantization)


def _output_widths(targets: Mapping[str, Target]) -> list[int]:
    """The outputs of the seven projections of a layer; 0 for one that no layer has. All are multiples of STRIP."""
    widths = [0] * _PROJECTIONS
    for target in targets.values():
        widths[target.number % _PROJECTIONS] = target.outputs
    assert not any(width % STRIP for width in widths)
    return widths


def _native(groups: RowGroups) -> tuple[Any, ...]:
    """The groups as the native operations take them."""
    adapters = groups.adapters
    weights, scales = [one.data for one in adapters], [one.scales for one in adapters]
    return weights, scales, [one.table for one in adapters], groups.rows, groups.starts
