"""Any model through transformers' own code, unmodified: all rows of a step packed as one row `[1, N]`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from serve_app.engines.native import attention
from serve_app.engines.native.attention import LayerCache, Layout, ShapeProbe
from serve_app.engines.native.linear import Quantization, swap
from serve_app.engines.native.loader import SourceError
from serve_app.engines.native.rows import Rows, span


class Computed(NamedTuple):
    """Of a step: `logits` `[S, V]` of the rows wanted and those told, `hidden` states `[E, H]` of those embedded."""

    logits: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's attention keeps of a token: `heads` keys and values, and on which device.

    `window` is how many positions a row looks back on, None where the layer does not say.
    """

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    window: int | None


class PackedModel:
    """The reference for every faster way to run a model, and the way of those that have none."""

    def __init__(self, model: PreTrainedModel, caches: Seq[LayerCache], quantization: Quantization) -> None:
        self._model = model
        self._caches = caches
        if model.device.type == "cpu" and (quantization != "none" or model.dtype == torch.bfloat16):
            swap(model, quantization, model.get_output_embeddings())
        for module, cache in zip(_attending(model), caches, strict=True):
            module.serve_app_cache = cache  # type: ignore[assignment]

    @property
    def weight_bytes(self) -> int:
        """Of everything but the embedding, of which a step reads a few rows."""
        packed = sum(getattr(module, "weight_bytes", 0) for module in self._model.modules())
        unpacked = sum(p.numel() * p.itemsize for p in self._model.parameters())
        embedding = self._model.get_input_embeddings().weight
        return int(packed + unpacked - embedding.numel() * embedding.itemsize)

    def forward(self, rows: Rows) -> Computed:
        """See ForwardPass."""
        layouts: dict[torch.device, Layout] = {}
        for cache in self._caches:
            device = cache.keys.device
            if device not in layouts:
                layouts[device] = attention.layout_of(rows, device)
            cache.layout = layouts[device]
        return _forward(self._model, rows)


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What the layers keep, learnt from one pass with probes in their attention's place.

    Raises SourceError for a model that remembers in another way than keys and values.
    """
    model.set_attn_implementation(attention.IMPLEMENTATION)
    modules = attention.attention_modules(model)
    for module in modules:
        module.serve_app_cache = ShapeProbe()  # type: ignore[assignment]
    _forward(model, span([0], slot=0, start=0))
    layers = _attending(model)
    wanted = model.config.get_text_config().num_hidden_layers
    if len(layers) != wanted:
        raise SourceError(
            f"{type(model).__name__}: {len(layers)} of {wanted} layers call transformers' attention interface, "
            "and what the others remember would be lost; this architecture is not supported"
        )
    shapes = []
    for module in layers:
        probe = module.serve_app_cache
        assert isinstance(probe, ShapeProbe)
        shapes.append(
            LayerShape(probe.heads, probe.key_dim, probe.value_dim, next(module.parameters()).device, probe.window)
        )
    return shapes


def unmasked_context(model: PreTrainedModel, shapes: Seq[LayerShape]) -> int | None:
    """The longest sequence that needs no mask but the causal one; None for any.

    transformers makes no masks for this attention. Most layers with a window also say so in their call, but some
    leave it to the mask (Phi-3.5-MoE, Moshi, Doge), and Llama 4 its chunks: these are right up to that length.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    lengths = {"chunked_attention": "attention_chunk_size"}
    if all(shape.window is None for shape in shapes):
        lengths["sliding_attention"] = "sliding_window"
    limits = [getattr(config, name, None) for kind, name in lengths.items() if kinds is None or kind in kinds]
    return min((limit for limit in limits if limit), default=None)


def _attending(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules whose probe, or whatever took its place, was called."""
    return [m for m in attention.attention_modules(model) if getattr(m.serve_app_cache, "heads", 0)]


def _forward(model: PreTrainedModel, rows: Rows) -> Computed:
    device = model.device
    output = model(
        input_ids=torch.tensor([rows.tokens], device=device),
        position_ids=torch.tensor([rows.positions], device=device),
        use_cache=False,
        logits_to_keep=torch.tensor(rows.sample_rows + rows.logprob_rows, dtype=torch.long, device=device),
        output_hidden_states=bool(rows.embedding_rows),
    )
    logits: torch.Tensor = output.logits[0]
    # The last of them comes after the last norm.
    hidden = output.hidden_states[-1][0][rows.embedding_rows] if rows.embedding_rows else logits.new_empty(0, 0)
    return Computed(logits, hidden)
