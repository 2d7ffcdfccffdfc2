"""What distinguishes the families of models that the fused path computes: the names of modules, and a few numbers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Family:
    """The names of a layer's norms, None where the family has none. A norm multiplies by its weights plus `offset`."""

    attention_norm: str | None = "input_layernorm"
    attended_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_result_norm: str | None = None
    offset: float = 0.0

    def norm(self, layer: Any, name: str | None) -> torch.Tensor | None:
        """The factors of a norm of a layer, float32; None if the family has no such norm."""
        return None if name is None else self.factors(layer.get_submodule(name))

    def factors(self, norm: Any) -> torch.Tensor:
        """The factors of a norm, float32."""
        weight: torch.Tensor = norm.weight.detach().float()
        return weight + self.offset if self.offset else weight

    def divide(self, norm: Any, scale: torch.Tensor) -> None:
        """Divide the factors of a norm in place."""
        if self.offset:  # the new weights have more digits than the old ones
            weight = self.factors(norm) / scale - self.offset
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        else:
            norm.weight.data /= scale


_LLAMA = Family()
_GEMMA = Family(
    attended_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_result_norm="post_feedforward_layernorm",
    offset=1.0,
)
_OLMO = Family(None, "post_attention_layernorm", None, "post_feedforward_layernorm")

# By the model_type of config.json.
FAMILIES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": _OLMO,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
}
# The activation functions of the MLP by their names in config.json, and whether they are GELU.
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model that the fused path supports."""
    return FAMILIES[model.config.model_type]


def activation(model: PreTrainedModel) -> str:
    """The name of the activation function of the MLP."""
    config = model.config
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Constants of a model's formulas. Scores of the attention are multiplied by `score_scale`.

    A cap `c` replaces a score or logit `x` by `c * tanh(x / c)`; 0 means none. `residual` multiplies what a layer adds.
    """

    score_scale: float
    score_cap: float
    residual: float
    gelu: bool
    embedding_scale: float
    logits_scale: float
    logits_cap: float


def numbers_of(model: PreTrainedModel) -> Numbers:
    """The constants of a model that the fused path supports."""
    config, attention = model.config, model.model.layers[0].self_attn
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    return Numbers(
        score_scale=float(attention.scaling),
        score_cap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
        residual=float(getattr(config, "residual_multiplier", 1)),
        gelu=ACTIVATIONS[activation(model)],
        embedding_scale=(
            float(getattr(config, "embedding_multiplier", 1)) if scale is None else float(scale.to(model.dtype))
        ),
        logits_scale=1 / float(getattr(config, "logits_scaling", 1)),
        logits_cap=float(getattr(config, "final_logit_softcapping", None) or 0),
    )


def mlp_sizes(model: PreTrainedModel) -> set[int]:
    """The inner sizes of the MLPs and of their experts."""
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    return {int(getattr(model.config, name)) for name in names if getattr(model.config, name, None)}


class _Separated(torch.nn.Module):
    """Several linear layers in place of one that computed all of their outputs."""

    def __init__(self, linears: Seq[torch.nn.Linear]) -> None:
        super().__init__()
        self._linears = tuple(linears)  # a tuple does not register them: they have other names in the model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self._linears], -1)


def separate_projections(model: PreTrainedModel) -> None:
    """Give the layers of a Phi-3 model separate projections, as those of the other families have. Copies nothing."""
    if model.config.model_type != "phi3":
        return
    config, layers = model.config, model.model.layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, shared = config.num_attention_heads * dim, config.num_key_value_heads * dim
    for layer in layers:
        _separate(layer.self_attn, "qkv_proj", {"q_proj": queries, "k_proj": shared, "v_proj": shared})
        half = config.intermediate_size
        _separate(layer.mlp, "gate_up_proj", {"gate_proj": half, "up_proj": half})


def _separate(owner: Any, name: str, outputs: dict[str, int]) -> None:
    whole: torch.nn.Linear = getattr(owner, name)
    weights = torch.split(whole.weight.detach(), list(outputs.values()))
    for part, weight in zip(outputs, weights, strict=True):
        linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        setattr(owner, part, linear)
    setattr(owner, name, _Separated([getattr(owner, part) for part in outputs]))
