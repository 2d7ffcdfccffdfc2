"""Loads a model and its tokenizer into memory, as the configuration of the model specifies."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from serve_app.config import Model
from serve_app.engines.files.conversion import check_missing_weights
from serve_app.engines.files.disk_cache import Report
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.files.sources import resolve
from serve_app.engines.files.text import configured_ends, explain, load_text
from serve_app.engines.native.device import choose_device, choose_dtype
from serve_app.engines.native.machine import return_memory
from serve_app.engines.native.threads import one_thread
from serve_app.engines.text.tokenizer import HFText


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model with its tokenizer.

    `context` is the longest sequence that the model supports; `end_ids` end an answer by its generation settings.
    """

    model: PreTrainedModel
    text: HFText
    context: int
    end_ids: tuple[int, ...] = ()


def load(config: Model, report: Report, folder: str | None = None) -> Loaded:
    """Load weights and tokenizer; each stage is passed to `report` in a few words.

    `folder` has the model's files, if they are known already.

    Raises SourceError when the source is missing, damaged or unsafe, or not a decoder-only language model.
    """
    transformers_logging.disable_progress_bar()
    device = choose_device(config.device, config.resources.num_gpus)
    folder = folder or resolve(config, report)
    report("loading weights")
    placement = config.device_map or ({"": device.index or 0} if device.type == "cuda" else None)
    dtype = choose_dtype(config.dtype, device, folder)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    quantized: dict[str, Any] = {}
    if config.quantization not in ("none", "auto") and device.type == "cuda":
        quantized["quantization_config"] = quantized_by_bitsandbytes(config.quantization, dtype)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=placement,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
            **options,
        )
    except Exception as error:  # a parser may raise any exception for a damaged file
        raise SourceError(explain(config, error)) from error
    check_missing_weights(loading, model, config.source)
    check_finite_weights(model, config.source)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ends = configured_ends(model.generation_config, config.source)
    text = load_text(config, folder, vocabulary, ends)
    model.eval()
    return_memory()
    return Loaded(model, text, _longest_context(model), ends)


@torch.inference_mode()
def check_finite_weights(model: PreTrainedModel, source: str) -> None:
    """Raises SourceError for weights that are NaN or infinite. An attention kernel can hide them from the logits.

    A sum is finite if all its terms are, unless it overflows, so that few tensors are checked value by value. On one
    thread the sums take as long as reading the weights; on a busy machine threads would wait for each other.
    """
    floats = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    with one_thread():
        suspect = [(name, weight) for name, weight in floats if not weight.sum(dtype=torch.float32).isfinite()]
    bad = [name for name, weight in suspect if not weight.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise SourceError(
            f"{source} has NaN or infinite weights in {', '.join(bad[:3])}{more}; copy or download its files again"
        )


def quantized_by_bitsandbytes(quantization: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """The configuration with which bitsandbytes quantizes the linear layers, except the head, while they load.

    int8 works without LLM.int8's outlier columns: bitsandbytes looks for them in all rows of a batch, so that one
    request could change the text of another. int4 is NF4 (QLoRA, arXiv 2305.14314). Raises SourceError where
    bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SourceError(
            f"quantization: {quantization} on a GPU needs bitsandbytes, which is not installed: "
            "pip install 'serve_app[cuda-quant]', or set quantization: none"
        )
    return bitsandbytes_config(quantization, dtype)


def bitsandbytes_config(quantization: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """See quantized_by_bitsandbytes."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16  # float32 if it were left out
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _longest_context(model: PreTrainedModel) -> int:
    """The largest number of positions that the model supports, derived as vLLM does.

    YaRN and linear scaling extend the range by their factor. For YaRN this is the original range, whether or not
    `max_position_embeddings` has been multiplied. For linear scaling it is `max_position_embeddings`, except that Gemma
    3 has multiplied it. Rope that changes with the longest sequence of a batch (`dynamic`, `longrope`) would make a
    request depend on other requests, so that these models are limited to their original range.
    """
    text = model.config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", None) or 2**31)
    rope = getattr(text, "rope_parameters", None) or {}
    by_kind = [value for value in rope.values() if isinstance(value, dict)]  # one for each type of layer
    scaled = [_scaled_context(longest, kind, text.model_type) for kind in by_kind or [rope]]
    return min((context for context in scaled if context is not None), default=longest)


def _scaled_context(longest: int, rope: dict[str, Any], model_type: str) -> int | None:
    """None if the scaling does not change the range."""
    original, factor = int(rope.get("original_max_position_embeddings") or longest), rope.get("factor") or 1.0
    match rope.get("rope_type"):
        case "dynamic" | "longrope":
            return min(longest, original)
        case "yarn":
            return int(original * factor)
        case "linear" if "gemma3" not in model_type:
            return int(longest * factor)
    return None
