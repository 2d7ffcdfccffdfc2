"""Loads a model and its tokenizer into memory, as the configuration of the model specifies."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from serve_app.config import Model, template_path
from serve_app.core.requests import Grammar
from serve_app.engines.native.conversion import check_missing_weights, convert_gguf
from serve_app.engines.native.disk_cache import Report
from serve_app.engines.native.model_files import SourceError
from serve_app.engines.native.sources import builtin_gguf, resolve
from serve_app.engines.text.tokenizer import HFText

__all__ = ["Loaded", "SourceError", "builtin_gguf", "convert_gguf", "load"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model with its tokenizer. `context` is the longest sequence that the model supports."""

    model: PreTrainedModel
    text: HFText
    context: int


def load(config: Model, report: Report) -> Loaded:
    """Load weights and tokenizer; each stage is passed to `report` in a few words.

    Raises SourceError when the source is missing, damaged or unsafe, or not a decoder-only language model.
    """
    transformers_logging.disable_progress_bar()
    device = choose_device(config.device, config.resources.num_gpus)
    folder = resolve(config, report)
    report("loading weights")
    placement = config.device_map or ({"": device.index or 0} if device.type == "cuda" else None)
    dtype = choose_dtype(config.dtype, device)
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
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # a parser may raise any exception for a damaged file
        raise SourceError(_explain(config, error)) from error
    check_missing_weights(loading, model, config.source)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise SourceError(f"{config.source}: the tokenizer has no fast form (tokenizer.json), which streaming needs")
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(config.chat_template, tokenizer)
    model.eval()
    return_memory()
    try:
        ends = _end_ids(model, tokenizer)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{config.source}: eos_token_id in generation_config.json is not a token id") from error
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text = HFText(tokenizer, ends, vocabulary, config.sanitize_control_tokens)
    # Builds the tokenizer's tables for grammars now. Built by the first request, they would delay all running requests.
    text.constraint(Grammar("json_object"), ignore_eos=False)
    chat = text.chat
    logger.info("tool call format: %s", "none" if chat.tools is None else repr(chat.tools.before))
    logger.info(
        "reasoning: %s", "none" if chat.reasoning is None else f"{chat.reasoning.start!r} to {chat.reasoning.end!r}"
    )
    return Loaded(model, text, _longest_context(model))


def choose_device(wanted: str, num_gpus: float) -> torch.device:
    """`auto`: the GPU that the replica reserved from Ray, if torch can use it.

    A replica without a reservation uses the CPU, although Ray does not hide the GPUs from it.
    """
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise SourceError("device: cuda, but torch finds no GPU; use device: auto, or set resources.num_gpus")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and num_gpus > 0 and usable) else "cpu")


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype | str:
    """`auto`: the checkpoint's dtype on a GPU; on CPU bfloat16 if the processor multiplies bfloat16, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type == "cuda":
        return "auto"
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


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


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512-BF16 or AMX). On others bfloat16 is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def return_memory() -> None:
    """Return the memory of loading and converting to the system; otherwise glibc keeps it (here over 400 MB)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read_template(source: str, tokenizer: Any) -> str:
    """The text of the configuration's chat template. Raises SourceError if it cannot be read or is not valid Jinja."""
    path = template_path(source)
    try:
        template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"chat_template: {path} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(f"chat_template: {path}, line {error.lineno}: {error.message}") from None
    except Exception:  # noqa: BLE001 - a template may refuse this conversation; requests then get its error
        return template
    return template


def _explain(config: Model, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"{config.source} contains its own code, which is not run; if you trust the code, set "
            f"trust_remote_code: true and pin `revision`"
        )
    if "safetensors" in text:
        return f"{config.source} has no safetensors weights, and pickled weights are not loaded; convert them ({text})"
    if "ignore_mismatched_sizes" in text:
        return f"{config.source}: the shapes of the weights do not match config.json"
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
        text = f"{type(error).__name__}: {text}"  # the message of such an error is often a single word
    # The rest of the message would be a list of all architectures.
    return f"{config.source} cannot be loaded: {text.partition(' Model type should be one of')[0]}"


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The end tokens of generation_config.json, and those of the tokenizer: of an answer, a turn and a message."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    ends = [*ends, *(getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "eot", "eom"))]
    return frozenset(int(token) for token in ends if token is not None)


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
