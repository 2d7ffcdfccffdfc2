"""The weights of a Llama-like model, packed for the fused path. They do not refer to the model that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from serve_app.engines.native.families import (
    ACTIVATIONS,
    FAMILIES,
    Family,
    Numbers,
    activation,
    family_of,
    mlp_sizes,
    numbers_of,
)
from serve_app.engines.native.linear import Linear, attached_importance, head_quantization, pack
from serve_app.engines.native.lora import Target, targets_of
from serve_app.engines.native.quantization import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_SIZES = (64, 96, 128, 256)
# Elements that a native operation processes at a time.
VECTOR_WIDTH = 16
# Positions whose rotary tables are compared with those of the model's own module.
_COMPARED_POSITIONS = 4096


@dataclass(frozen=True, slots=True)
class Mlp:
    """Gate and up as one linear layer, activation, and down."""

    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers in order."""
        return self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class Experts:
    """Several MLPs, of which each row uses `top` (Shazeer et al. 2017, arXiv 1701.06538).

    `router` computes the logits of the experts for a row. The results of the most probable ones are multiplied by their
    probabilities, which are divided by their sum if they are `normalised`. If there is a `shared` expert, each row uses
    it, times the sigmoid of `shared_gate`.
    """

    router: Linear
    top: int
    normalised: bool
    experts: tuple[Mlp, ...]
    shared: Mlp | None
    shared_gate: Linear | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers in the order of the native operation."""
        assert (self.shared is None) == (self.shared_gate is None)
        shared = () if self.shared is None or self.shared_gate is None else (*self.shared.linears, self.shared_gate)
        return self.router, *shared, *(linear for expert in self.experts for linear in expert.linears)


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer, in the order in which a row passes them; None for a norm that the family does not have.

    The norms of queries and keys are of each head `[head_size]`, or of all heads together `[heads * head_size]`.
    `rotary` is the index of its rotary embedding. `window` is the number of positions that a row attends to, 0 for all.
    """

    norm: torch.Tensor | None
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    rotary: int
    window: int
    out: Linear
    attended_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    mlp: Mlp | Experts
    mlp_result_norm: torch.Tensor | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers, in the order in which a row passes them."""
        return self.qkv, self.out, *self.mlp.linears

    @property
    def norms(self) -> tuple[torch.Tensor | None, ...]:
        """The norms before and after the attention, and before and after the MLP."""
        return self.norm, self.attended_norm, self.mlp_norm, self.mlp_result_norm


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding (RoFormer: Su et al. 2021, arXiv 2104.09864).

    `frequencies` `[head_size / 2]` are in radians per position, 0 for a layer without position embedding; `factor`
    multiplies both tables.
    """

    frequencies: torch.Tensor
    factor: float

    def tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[length, head_size / 2]` of the positions from 0 on."""
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self.frequencies)
        return angles.cos() * self.factor, angles.sin() * self.factor


@dataclass(frozen=True, slots=True)
class FusedWeights:
    """All that the fused path needs of a model. `dtype` is that of the model's own weights.

    `targets` are the linear layers by their names, in the order in which the fused path concatenates them.
    """

    heads: int
    head_size: int
    eps: float
    numbers: Numbers
    dtype: torch.dtype
    quantization: Quantization
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear
    rotaries: tuple[Rotary, ...]
    targets: dict[str, Target]

    @property
    def linears(self) -> Iterator[Linear]:
        """All linear layers; the last one is the head."""
        for layer in self.layers:
            yield from layer.linears
        yield self.head


def fused_weights(model: PreTrainedModel, windows: Seq[int | None], quantization: Quantization) -> FusedWeights:
    """The packed weights of a model that the fused path supports: see `unsupported_reason`."""
    config, inner, family = model.config, model.model, family_of(model)
    rotaries, projections = _rotaries(model), _projections(model)
    kinds = list(rotaries)
    return FusedWeights(
        heads=config.num_attention_heads,
        head_size=_head_size(model),
        eps=float(config.rms_norm_eps),
        numbers=numbers_of(model),
        dtype=model.dtype,
        quantization=quantization,
        targets=targets_of(projections.values(), projections),
        embedding=model.get_input_embeddings().weight.detach(),
        layers=tuple(
            _layer(layer, family, kinds.index(_rotary_kind(layer)), window or 0, quantization)
            for layer, window in zip(inner.layers, windows, strict=True)
        ),
        norm=family.factors(inner.norm),
        head=pack(model.get_output_embeddings().weight, None, head_quantization(quantization)),
        rotaries=tuple(rotaries.values()),
    )


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why the fused path cannot run this model; None if it can."""
    config = model.config
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        return f"the fused path does not support {model.dtype} on {model.device}"
    if config.model_type not in FAMILIES:
        return f"the fused path supports the model types {', '.join(FAMILIES)}, not {config.model_type}"
    sizes = {config.hidden_size, *mlp_sizes(model)}
    if _head_size(model) not in HEAD_SIZES or any(size % VECTOR_WIDTH for size in sizes):
        listed = " and ".join(map(str, sorted(sizes)))
        return f"the fused path does not support heads of size {_head_size(model)} with rows of {listed}"
    if activation(model) not in ACTIVATIONS:
        return f"the fused path does not support the activation function {activation(model)}"
    if not _same_tables(model):
        return "the fused path does not support its rotary position embedding"
    return None


def _head_size(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _layer(layer: Any, family: Family, rotary: int, window: int, quantization: Quantization) -> Layer:
    attention = layer.self_attn
    return Layer(
        norm=family.norm(layer, family.attention_norm),
        qkv=_concatenated([attention.q_proj, attention.k_proj, attention.v_proj], quantization),
        query_norm=family.factors(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=family.factors(attention.k_norm) if hasattr(attention, "k_norm") else None,
        rotary=rotary,
        window=window,
        out=_concatenated([attention.o_proj], quantization),
        attended_norm=family.norm(layer, family.attended_norm),
        mlp_norm=family.norm(layer, family.mlp_norm),
        mlp=_experts(layer.mlp, quantization) if hasattr(layer.mlp, "experts") else _mlp(layer.mlp, quantization),
        mlp_result_norm=family.norm(layer, family.mlp_result_norm),
    )


def _mlp(mlp: Any, quantization: Quantization) -> Mlp:
    gate_up, down = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
    return Mlp(_concatenated(gate_up, quantization), _concatenated(down, quantization))


def _experts(block: Any, quantization: Quantization) -> Experts:
    router, weights = block.gate, block.experts

    def unquantized(weight: torch.Tensor) -> Linear:
        """Rounding the weights of a router changes the experts that it chooses."""
        return pack(weight if quantization == "none" else weight.bfloat16(), None, "none")

    pairs = zip(weights.gate_up_proj.detach(), weights.down_proj.detach(), strict=True)
    return Experts(
        router=unquantized(router.weight),
        top=int(router.top_k),
        normalised=bool(getattr(router, "norm_topk_prob", True)),
        experts=tuple(Mlp(pack(up, None, quantization), pack(down, None, quantization)) for up, down in pairs),
        shared=_mlp(block.shared_expert, quantization) if hasattr(block, "shared_expert") else None,
        shared_gate=unquantized(block.shared_expert_gate.weight) if hasattr(block, "shared_expert_gate") else None,
    )


def _projections(model: PreTrainedModel) -> dict[int, tuple[str, torch.nn.Module]]:
    """The linear layers that adapters can change, with their names, by number: seven numbers for each layer.

    The numbers follow the order in which the fused path concatenates the layers. Experts cannot be adapted.
    """
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers: Any = model.model.layers
    return {
        len(names) * place + number: (f"model.layers.{place}.{name}", layer.get_submodule(name))
        for place, layer in enumerate(layers)
        for number, name in enumerate(names)
        if not (name.startswith("mlp") and hasattr(layer.mlp, "experts"))
    }


def _concatenated(linears: Seq[torch.nn.Linear], quantization: Quantization) -> Linear:
    """Layers with the same input as one layer."""
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return pack(weight, bias, quantization, attached_importance(linears[0]))


def _rotary_kind(layer: Any) -> str | None:
    """Which of the model's rotary embeddings a layer has: `""` for the only one; None for a layer without one."""
    attention = layer.self_attn
    if not getattr(attention, "use_rope", True):
        return None
    return str(attention.layer_type) if attention.config.model_type == "gemma3_text" else ""


def _rotaries(model: PreTrainedModel) -> dict[str | None, Rotary]:
    """The rotary embeddings of the layers by their kinds, in the order of the layers.

    The frequencies are those after the model's rope scaling; for scaling by length, those of its original range.
    """
    module: Any = model.model.rotary_emb
    found: dict[str | None, Rotary] = {}
    for kind in dict.fromkeys(_rotary_kind(layer) for layer in model.model.layers):
        if kind is None:
            found[kind] = Rotary(torch.zeros(_head_size(model) // 2), 1.0)
        else:
            prefix = f"{kind}_" if kind else ""
            frequencies = getattr(module, f"{prefix}inv_freq").detach().float()
            found[kind] = Rotary(frequencies, float(getattr(module, f"{prefix}attention_scaling")))
    return found


def _same_tables(model: PreTrainedModel) -> bool:
    """Whether the model's own rotary embeddings compute the tables of `_rotaries`, for whole heads."""
    length = min(_COMPARED_POSITIONS, int(getattr(model.config, "max_position_embeddings", _COMPARED_POSITIONS)))
    module: Any = model.model.rotary_emb
    for kind, rotary in _rotaries(model).items():
        if kind is None:
            continue
        own = module(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None], *([kind] if kind else []))
        for theirs, ours in zip(own, rotary.tables(length), strict=True):
            whole = torch.cat([ours, ours], -1)
            if theirs.shape[2] != _head_size(model) or whole.shape != theirs[0].shape:
                return False
            if not torch.allclose(theirs[0], whole, atol=1e-6):
                return False
    return True
