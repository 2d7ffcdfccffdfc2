"""The Hugging Face path: any model by transformers' own code, with all rows of a step packed as one sequence `[1, N]`.

This path supports the most models and is the reference of the fused path (fused.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AttentionInterface, PreTrainedModel

from serve_app.engines.files.adapter_files import AdapterFiles
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native import attention
from serve_app.engines.native.attention import LayerCache, Layout, ShapeProbe
from serve_app.engines.native.forward import ForwardOutput, LayerShape, SelfTest
from serve_app.engines.native.linear import replace_linears
from serve_app.engines.native.lora import LoraWeights, RowGroups, Target, add_lora, make_weights, targets_of
from serve_app.engines.native.machine import NotEnoughMemory
from serve_app.engines.native.quantization import Quantization
from serve_app.engines.native.rows import Rows, span

_IMPLEMENTATION = "serve_app_slots"
# No mask function is registered under this name, so that transformers builds no mask.
AttentionInterface.register(_IMPLEMENTATION, attention.attention_function)


class TransformersModel:
    """A forward pass by the transformers model itself. On CPU its linear layers are replaced by faster ones.

    If it `adapts`, LoRA adapters can change every linear layer but the head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        caches: Seq[LayerCache],
        quantization: Quantization,
        adapts: bool = False,
    ) -> None:
        self._model = model
        self._caches = caches
        self.targets = targets_of(_linears(model)) if adapts else {}
        self._adapter_dtype = torch.float32 if quantization == "none" and model.dtype == torch.float32 else model.dtype
        self._groups: RowGroups | None = None
        if model.device.type == "cpu" and (quantization != "none" or model.dtype == torch.bfloat16):
            replace_linears(model, quantization, model.get_output_embeddings())
        for module, cache in zip(_attention_layers(model), caches, strict=True):
            module.serve_app_cache = cache  # type: ignore[assignment]
        for name, target in self.targets.items():
            model.get_submodule(name).register_forward_hook(partial(self._add_adapters, target))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights but the embedding, of which a step reads a few rows only."""
        packed = sum(getattr(module, "weight_bytes", 0) for module in self._model.modules())
        unpacked = sum(p.numel() * p.itemsize for p in self._model.parameters())
        embedding = self._model.get_input_embeddings().weight
        return int(packed + unpacked - embedding.numel() * embedding.itemsize)

    def make_adapter(self, files: AdapterFiles) -> LoraWeights:
        """See ForwardPass."""
        return make_weights(files, self.targets, self._adapter_dtype, self._model.device)

    def forward(self, rows: Rows) -> ForwardOutput:
        """See ForwardPass."""
        self._groups = RowGroups.of(rows.adapters, self._model.device) if rows.adapters else None
        layouts: dict[torch.device, Layout] = {}
        for cache in self._caches:
            device = cache.keys.device
            if device not in layouts:
                layouts[device] = attention.layout_of(rows, device)
            cache.layout = layouts[device]
        return _forward(self._model, rows)

    def _add_adapters(self, target: Target, _: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Called with the input and the output `[1, N, ...]` of a layer, and changes the output."""
        if self._groups is not None:
            add_lora(output[0], inputs[0][0], self._groups, target)


@torch.inference_mode()
def tested(
    model: PreTrainedModel, caches: Seq[LayerCache], quantization: Quantization, adapts: bool, test: SelfTest
) -> TransformersModel:
    """The forward pass of a model with these caches. Raises SourceError if it fails the self-test."""
    with as_source_error(model):
        forward = TransformersModel(model, caches, quantization, adapts)
        fault = test.fault(forward, quantization)
    if fault is not None:
        raise SourceError(f"{type(model).__name__} {fault}; this architecture is not supported")
    return forward


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Shapes of all layers, found by one pass with a ShapeProbe in place of each layer's cache.

    Raises SourceError for a model whose layers keep a state other than keys and values.
    """
    model.set_attn_implementation(_IMPLEMENTATION)
    modules = attention.attention_modules(model)
    for module in modules:
        module.serve_app_cache = ShapeProbe()  # type: ignore[assignment]
    _forward(model, span([0], slot=0, start=0))
    layers = _attention_layers(model)
    wanted = model.config.get_text_config().num_hidden_layers
    if len(layers) != wanted:
        raise SourceError(
            f"{type(model).__name__}: {len(layers)} of {wanted} layers call transformers' attention interface; the "
            "state of the other layers would be lost, so that this architecture is not supported"
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
    """The longest sequence for which the causal mask suffices; None if it suffices for any length.

    transformers builds no masks for this attention function. Most layers with a window pass the window to the
    attention function, but some express it by the mask only (Phi-3.5-MoE, Moshi, Doge), as Llama 4 does with its
    chunks. The results of these models are correct up to the length of the window or chunk.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    lengths = {"chunked_attention": "attention_chunk_size"}
    if all(shape.window is None for shape in shapes):
        lengths["sliding_attention"] = "sliding_window"
    limits = [getattr(config, name, None) for kind, name in lengths.items() if kinds is None or kind in kinds]
    return min((limit for limit in limits if limit), default=None)


def _linears(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def _attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules whose probe was called, which later hold the probe or a cache."""
    return [m for m in attention.attention_modules(model) if getattr(m.serve_app_cache, "heads", 0)]


def _forward(model: PreTrainedModel, rows: Rows) -> ForwardOutput:
    device = model.device
    output = model(
        input_ids=torch.tensor([rows.tokens], device=device),
        position_ids=torch.tensor([rows.positions], device=device),
        use_cache=False,
        logits_to_keep=torch.tensor(rows.sample_rows + rows.logprob_rows, dtype=torch.long, device=device),
        output_hidden_states=bool(rows.embedding_rows),
    )
    logits: torch.Tensor = output.logits[0]
    # The last hidden state is the one after the last norm.
    hidden = output.hidden_states[-1][0][rows.embedding_rows] if rows.embedding_rows else logits.new_empty(0, 0)
    return ForwardOutput(logits, hidden)


@contextmanager
def as_source_error(model: torch.nn.Module) -> Iterator[None]:
    """Turn any exception of the model's code, which may not support this kind of call, into a SourceError."""
    try:
        yield
    except (SourceError, NotEnoughMemory):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{type(model).__name__} cannot be run: {reason}") from error
