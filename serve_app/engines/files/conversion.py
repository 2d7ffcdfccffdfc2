"""Converts a GGUF file to a folder of float32 safetensors with its tokenizer, which the cache folder keeps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils as transformers_gguf,
)

from serve_app.engines.files import gguf_rope
from serve_app.engines.files.disk_cache import (
    CacheError,
    Report,
    Work,
    cache_subfolder,
    cached_folder,
    require_space,
)
from serve_app.engines.files.gguf_header import GgufHeader, read_header
from serve_app.engines.files.known_conversions import CONVERSION, remember_conversion
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.files.progress import Progress, estimate

# Space for the tokenizer's files, beside the weights.
_TOKENIZER_BYTES = 64 * 2**20
# Frequencies of the rotary embedding in old files of Llama. They follow from its base.
_UNNEEDED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
_END_TOKENS = ("eos", "eot", "eom")


def convert_gguf(path: Path, report: Report, root: Path | None = None) -> Path:
    """The folder of a GGUF file's weights, dequantized once to float32 safetensors, with its tokenizer.

    The conversion is kept under `root`, by default the user's cache folder, by the file's hash. It appears complete or
    not at all, a damaged one is converted again, and of several processes one converts while the others wait.
    Raises SourceError; for a file that is not whole or whose positions cannot be computed, before it is hashed.
    """
    report("checking the model file")
    header = read_header(path)
    gguf_rope.scaling(header)  # for its errors
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    work = Work(
        lambda part: _convert_or_explain(header, part, report), "converting the model file", "converts the model"
    )
    try:
        folder = (root or cache_subfolder("models")) / f"{path.stem}-{digest[:16]}-v{CONVERSION}"
        folder = cached_folder(folder, work, report)
    except CacheError as error:
        raise SourceError(str(error)) from error
    if root is None:
        remember_conversion(path, folder)
    return folder


def check_missing_weights(loading: dict[str, Any], model: PreTrainedModel, source: str) -> None:
    """Raises SourceError for missing weights, which transformers initializes at random."""
    if missing := sorted(loading["missing_keys"]):
        raise SourceError(f"{source} lacks weights of a {type(model).__name__}: {', '.join(missing[:3])}")


def _convert_or_explain(header: GgufHeader, folder: Path, report: Report) -> None:
    try:
        _convert(header, folder, report)
    except (SourceError, CacheError):
        raise
    except Exception as error:  # a parser may raise any exception for a damaged file
        raise SourceError(f"{header.path} cannot be converted: {' '.join(str(error).split())}") from error


def _convert(header: GgufHeader, folder: Path, report: Report) -> None:
    path = header.path
    progress = Progress(report, folder, header.weights, estimate(header, folder.parent))
    with progress.reported(), _watched(progress):
        # To read the file's fields takes seconds: the configuration is read once, for the model and the tokenizer.
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        gguf_rope.set_rope(config, header)
        weights = _check_tensors(header, config)
        require_space(folder.parent, 4 * weights + _TOKENIZER_BYTES, f"the conversion of {path}")
        source = {"gguf_file": path.name, "config": config}
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **source
        )
        check_missing_weights(loading, model, str(path))
        # The tensors are plain float32 now; with these attributes, transformers treats the model as a GGUF model.
        model.hf_quantizer = None
        model.config.quantization_config = None
        del model.config.quantization_config
        if model.generation_config is not None:
            model.generation_config.eos_token_id = _end_ids(header, model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, **source).save_pretrained(folder)


def _check_tensors(header: GgufHeader, config: PretrainedConfig) -> int:
    """The number of the model's weights, counted without allocating them.

    Raises SourceError when the model takes no notice of some tensors of the file, which transformers drops silently.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    gguf_rope.check_rope(model, header)
    processor = transformers_gguf.TENSOR_PROCESSORS.get(header.architecture, transformers_gguf.TensorProcessor)
    taken = transformers_gguf.get_gguf_hf_weights_map(model, processor(config=config.to_dict()))
    unused = [
        name
        for name in header.tensors.keys() - gguf_rope.TENSORS
        if name not in taken and name.removesuffix(".weight") not in taken and not _UNNEEDED.fullmatch(name)
    ]
    if unused:
        raise SourceError(
            f"{header.path} has tensors that a {type(model).__name__} does not use ({len(unused)}: "
            f"{', '.join(sorted(unused)[:3])}), and without them its answers would be wrong; use the model's "
            "safetensors files"
        )
    parameters: list[torch.nn.Parameter] = list(model.parameters())
    return sum(parameter.numel() for parameter in parameters)


def _end_ids(header: GgufHeader, model: PreTrainedModel) -> list[int]:
    """The tokens that end an answer: those of the model's configuration, and the ends of a turn and of a message."""
    assert model.generation_config is not None
    configured = model.generation_config.eos_token_id
    ends = {header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _END_TOKENS}
    ends.update(configured if isinstance(configured, list) else [configured])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return sorted(int(end) for end in ends if isinstance(end, int) and end < vocabulary)


@contextmanager
def _watched(progress: Progress) -> Iterator[None]:
    """Count the weights that transformers dequantizes, and let it read the file and map its names once only.

    transformers reads the whole header for the configuration and again for the weights, which takes seconds, and maps
    the names of tensors again for each module of a model, here 397 times. Its progress bar would fill the log.
    """
    original = gguf.dequantize

    def dequantize(*arguments: Any) -> Any:
        values = original(*arguments)
        progress.dequantized += values.size
        return values

    with (
        _replaced(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        _replaced(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        _replaced(gguf, "dequantize", dequantize),
        _replaced(transformers_gguf, "tqdm", lambda tensors, **_: tensors),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)
