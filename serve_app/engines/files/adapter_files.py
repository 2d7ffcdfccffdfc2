"""Reads the files of a LoRA adapter in PEFT's format, from the sources that the configuration allows."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config import Lora
from serve_app.core.requests import Adapter
from serve_app.engines.files.disk_cache import safetensors_fault
from serve_app.engines.files.model_files import SourceError, check_not_pointer
from serve_app.errors import InvalidRequest, NotFound, ServeAppError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLED = "adapter_model.bin"
_FIELD = "lora_path"
# Settings of PEFT that change what an adapter computes, and that the engines do not know.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "lora_bias",
    "fan_in_fan_out": "fan_in_fan_out",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Initializations that leave the base model as it is. Others, such as PiSSA, change it when PEFT loads the adapter.
_PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of an adapter. The patterns replace `rank` and `alpha` for the modules that they match."""

    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        return int(_matching(self.rank_pattern, module, self.rank))

    def scaling(self, module: str) -> float:
        """The factor of the product B A x of a module. rsLoRA divides alpha by the root of the rank (2312.03732)."""
        rank, alpha = self.rank_of(module), float(_matching(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it was read once: its settings, the bytes of its two files, and the digest of both."""

    settings: LoraSettings
    config: bytes
    weights: bytes
    digest: str


def read_adapter(adapter: Adapter, options: Lora) -> AdapterFiles:
    """Raises NotFound for files that do not exist, and InvalidRequest for what is not allowed or not supported."""
    config_file, weights_file = _files(adapter, options)
    try:
        check_not_pointer(config_file)
        check_not_pointer(weights_file)
    except SourceError as error:
        raise InvalidRequest(str(error), param=_FIELD) from None
    if fault := safetensors_fault(weights_file):
        raise InvalidRequest(f"{weights_file.name} {fault}. Copy or download the file again.", param=_FIELD)
    config, weights = config_file.read_bytes(), weights_file.read_bytes()
    digest = hashlib.blake2b(len(config).to_bytes(8, "little"), digest_size=16)
    digest.update(config)
    digest.update(weights)
    return AdapterFiles(_settings(config, options.max_rank), config, weights, digest.hexdigest())


def check_fit(files: AdapterFiles, model: Path) -> None:
    """Raises InvalidRequest for an adapter whose shapes are not those of the model's weights in the folder `model`.

    A layer of which the folder has no plain weight, as in a quantized checkpoint, is not checked.
    """
    shapes = _shapes(model)
    length = int.from_bytes(files.weights[:8], "little")
    for name, tensor in json.loads(files.weights[8 : 8 + length]).items():
        module, found, factor = name.removeprefix(PREFIX).partition(".lora_")
        weight = shapes.get(f"{module}.weight")
        if not found or weight is None:
            continue
        rank = files.settings.rank_of(module)
        expected = [rank, weight[1]] if factor.startswith("A") else [weight[0], rank]
        if tensor["shape"] != expected:
            raise InvalidRequest(
                f"{name} has the shape {tensor['shape']}; this model needs {expected}. The adapter was made for "
                "another model.",
                param=_FIELD,
            )


def _shapes(model: Path) -> dict[str, list[int]]:
    """The shape of every weight in the headers of a folder's safetensors files."""
    shapes: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    return shapes


def _files(adapter: Adapter, options: Lora) -> tuple[Path, Path]:
    """The two files of an adapter. Those of a folder that is allowed at run time lie in it, without symbolic links."""
    configured = any((one.source, one.revision) == (adapter.source, adapter.revision) for one in options.adapters)
    if adapter.revision is not None:
        if not configured and f"{adapter.source}@{adapter.revision}" not in options.allow:
            raise _not_allowed(adapter)
        folder = _downloaded(adapter)
        return _existing(folder, CONFIG), _existing(folder, WEIGHTS)
    folder = Path(adapter.source).expanduser()
    if configured:
        if not folder.is_dir() and not adapter.source.startswith(("/", "~", ".")):
            folder = _downloaded(adapter)
        return _existing(folder, CONFIG), _existing(folder, WEIGHTS)
    roots = [Path(one).expanduser().resolve() for one in options.allow if one.startswith(("/", "~"))]
    real = folder.resolve()
    root = next((root for root in roots if folder.is_absolute() and real.is_relative_to(root)), None)
    if root is None:
        raise _not_allowed(adapter)
    files = _existing(real, CONFIG), _existing(real, WEIGHTS)
    if not all(file.resolve().is_relative_to(root) for file in files):
        raise _not_allowed(adapter)
    return files


def _not_allowed(adapter: Adapter) -> InvalidRequest:
    return InvalidRequest(f"{adapter.source} is not in the list lora.allow of the model.", param=_FIELD)


def _existing(folder: Path, name: str) -> Path:
    file = folder / name
    if file.is_file():
        return file
    if name == WEIGHTS and (folder / _PICKLED).is_file():
        raise InvalidRequest(
            f"{_PICKLED} is pickled, and loading it could execute code. Save the adapter as {WEIGHTS}.", param=_FIELD
        )
    raise NotFound(f"No adapter: {file} does not exist.", param=_FIELD)


def _downloaded(adapter: Adapter) -> Path:
    try:
        from huggingface_hub import snapshot_download  # takes 0.5 s

        return Path(snapshot_download(adapter.source, revision=adapter.revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise NotFound(f"{adapter.source} cannot be downloaded from the model hub: {reason}", param=_FIELD) from None


def _settings(config: bytes, max_rank: int) -> LoraSettings:
    try:
        read = json.loads(config)
        if read["peft_type"] != "LORA":
            raise InvalidRequest(f"The adapter is of the type {read['peft_type']}; only LORA is supported.", _FIELD)
        settings = LoraSettings(
            int(read["r"]),
            float(read["lora_alpha"]),
            bool(read.get("use_rslora")),
            dict(read.get("rank_pattern") or {}),
            dict(read.get("alpha_pattern") or {}),
        )
    except ServeAppError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InvalidRequest(f"{CONFIG} is damaged, or is not one of PEFT.", param=_FIELD) from None
    refused = [name for key, name in _UNSUPPORTED.items() if read.get(key)]
    if read.get("bias", "none") != "none":
        refused.append(f"bias {read['bias']}")
    initialization = read.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower() not in _PLAIN_INITIALIZATIONS:
        refused.append(f"init_lora_weights {initialization}")
    if refused:
        raise InvalidRequest(f"The adapter uses {', '.join(refused)}, which is not supported.", param=_FIELD)
    largest = max([settings.rank, *settings.rank_pattern.values()])
    if not 1 <= min([settings.rank, *settings.rank_pattern.values()]) <= largest <= max_rank:
        raise InvalidRequest(
            f"The adapter has rank {largest}; the model takes 1 to {max_rank}. Raise lora.max_rank.", param=_FIELD
        )
    return settings


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that matches the end of the module's name, as in PEFT."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
