"""Prepares a model of transformers: quantizes it, packs it for the fused path if that supports it, and tests it."""

from __future__ import annotations

import logging
from collections.abc import Set

import torch
from transformers import PreTrainedModel

from serve_app.config import Model
from serve_app.core.requests import TextPrompt
from serve_app.engines.files.disk_cache import Report
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native import calibration, kernels
from serve_app.engines.native.families import separate_projections
from serve_app.engines.native.forward import SELF_TEST_TOKENS, LayerShape, SelfTest
from serve_app.engines.native.fused import fused_fault
from serve_app.engines.native.fused_weights import FusedWeights, fused_weights, unsupported_reason
from serve_app.engines.native.linear import attach_importance
from serve_app.engines.native.loader import Loaded, load
from serve_app.engines.native.machine import processor_flags
from serve_app.engines.native.prepared import ModelFacts, Prepared
from serve_app.engines.native.quantization import Choice, Quantization, RequestedQuantization, choose_quantization
from serve_app.engines.native.smooth import smooth
from serve_app.engines.native.transformers_path import as_source_error, layer_shapes, unmasked_context

logger = logging.getLogger(__name__)


def prepare_from_files(config: Model, folder: str, report: Report) -> Prepared:
    """Load and prepare the model in `folder` with the settings of its configuration. Raises SourceError."""
    return prepare(load(config, report, folder), config.quantization, report, config.embeddings)


def prepare(
    loaded: Loaded,
    requested: RequestedQuantization = "none",
    report: Report = lambda stage: None,
    embeddings: bool = False,
    flags: Set[str] | None = None,
) -> Prepared:
    """The model with packed weights if the fused path supports it, else as it is. Changes the weights of `loaded`.

    `flags` are the processor's instruction sets, by which `auto` chooses the quantization. Raises SourceError when the
    model's code does not support this kind of call, and when `embeddings` are requested and the model does not return
    its hidden states.
    """
    model = loaded.model
    choice = _choose_quantization(requested, model, processor_flags() if flags is None else flags, report)
    count = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    divisors: torch.Tensor | None = None
    with as_source_error(model), torch.inference_mode():
        test = _self_test(model, loaded.context, embeddings)
        fused = unsupported_reason(model) is None
        if fused:
            separate_projections(model)
        if choice.quantization != "none" and model.device.type == "cpu":
            divisors = _calibrate(loaded, choice.quantization, fused)
        shapes = tuple(layer_shapes(model))
        weights = _packed(model, shapes, choice.quantization, test, report)
    if weights is None and requested == "auto" and choice.quantization != "none":
        choice = Choice("none", "the model runs on the Hugging Face path, which auto does not quantize")
    facts = ModelFacts(
        name=type(model).__name__,
        context=min(loaded.context, unmasked_context(model, shapes) or loaded.context),
        vocabulary=loaded.text.vocabulary,
        end_ids=loaded.end_ids,
        dtype=model.dtype,
        quantization=choice.quantization,
        reason=choice.reason,
        weight_count=count,
        shapes=shapes,
        hidden_divisors=divisors,
        test=test,
    )
    return Prepared(facts, model if weights is None else weights, loaded.text)


def _choose_quantization(
    requested: RequestedQuantization, model: PreTrainedModel, flags: Set[str], report: Report
) -> Choice:
    choice = choose_quantization(requested, flags, model.device.type, unsupported_reason(model))
    if requested == "auto" and choice.quantization != "none" and not kernels.available(report):
        return Choice("none", "auto quantizes on the fused path only, which needs the native kernels")
    return choice


def _self_test(model: PreTrainedModel, context: int, embeddings: bool) -> SelfTest:
    """A few tokens, and the logits of the unmodified model after them. Call it before the weights are changed.

    Raises SourceError if the model computes no finite numbers.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = tuple((i + 1) * 7919 % vocabulary for i in range(min(SELF_TEST_TOKENS, context)))
    ids = torch.tensor([tokens], device=model.device)
    output = model(input_ids=ids, use_cache=False, output_hidden_states=embeddings)
    if embeddings and not output.hidden_states:
        raise SourceError(
            f"{type(model).__name__} does not return hidden states, which embeddings need; set embeddings: false"
        )
    if not output.logits.amax(-1).isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise SourceError(
            f"{type(model).__name__} computes NaN or infinite numbers with dtype {dtype}; set dtype: float32"
        )
    return SelfTest(tokens, output.logits[0, -1])


def _packed(
    model: PreTrainedModel, shapes: tuple[LayerShape, ...], quantization: Quantization, test: SelfTest, report: Report
) -> FusedWeights | None:
    """None if the fused path does not support the model or fails the self-test."""
    name, reason = type(model).__name__, unsupported_reason(model)
    if reason is not None:
        logger.info("%s runs on the Hugging Face path: %s", name, reason)
        return None
    if not kernels.available(report):
        return None
    weights = fused_weights(model, [shape.window for shape in shapes], quantization)
    error = fused_fault(weights, shapes, test)
    if error is not None:
        logger.warning("%s runs on the Hugging Face path: on the fused path it %s", name, error)
        return None
    return weights


def _calibrate(loaded: Loaded, quantization: Quantization, smoothable: bool) -> torch.Tensor | None:
    """Prepare the model's weights for quantization by a pass or two over a short text.

    Returns the divisors of the channels of the last hidden states, if the model is smoothed.
    """
    (ids,) = loaded.text.encode([TextPrompt(calibration.TEXT)])
    assert isinstance(ids, list)
    ids = ids[: loaded.context]
    divisors = smooth(loaded.model, ids) if smoothable else None
    if quantization == "int4":
        attach_importance(calibration.input_statistics(loaded.model, ids, calibration.mean_square))
    return divisors
