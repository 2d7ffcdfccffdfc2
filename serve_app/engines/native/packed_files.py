"""Keeps the packed weights of models in the cache folder, so that the next start of a replica only maps them.

A start from these files does not import the models of transformers and does not read the model's own weights. The
replicas of a node map the same file, so that its weights are in memory once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from serve_app.config import Model
from serve_app.engines.files.disk_cache import (
    CacheError,
    Report,
    Work,
    cache_subfolder,
    cached_folder,
    delete,
    require_space,
)
from serve_app.engines.files.text import load_text
from serve_app.engines.native import kernels
from serve_app.engines.native.device import choose_dtype
from serve_app.engines.native.families import Numbers
from serve_app.engines.native.forward import LayerShape, SelfTest
from serve_app.engines.native.fused import fused_fault
from serve_app.engines.native.fused_weights import Experts, FusedWeights, Layer, Mlp, Rotary
from serve_app.engines.native.linear import STORABLE, restored_layer, stored_fields
from serve_app.engines.native.lora import Target
from serve_app.engines.native.machine import return_memory
from serve_app.engines.native.prepared import ModelFacts, Prepared

logger = logging.getLogger(__name__)

_DESCRIPTION, _WEIGHTS, _USED = "model.json", "weights.bin", "used"
# A tensor begins at a cache line, as torch allocates it.
_ALIGNMENT = 64
# An entry that was not used for this time is deleted when another one is made.
_UNUSED_S = 30 * 24 * 3600.0
_CLASSES = {
    cls.__name__: cls
    for cls in (Experts, FusedWeights, Layer, LayerShape, Mlp, ModelFacts, Numbers, Rotary, SelfTest, Target)
}


class _NotStorable(Exception):
    """The model has no packed weights, or weights that only the library that packed them can read."""


def prepared(config: Model, folder: str, make: Callable[[], Prepared], report: Report) -> Prepared:
    """The model in `folder`, from the cache; if it is not there, the result of `make`, which is stored if possible.

    Of several processes, one calls `make` while the others wait.
    """
    made: list[Prepared] = []

    def write(part: Path) -> None:
        made.append(make())
        model = made[0].model
        if not isinstance(model, FusedWeights) or not all(isinstance(linear, STORABLE) for linear in model.linears):
            raise _NotStorable
        report("storing the packed weights")
        _write(part, made[0].facts, model)

    entry = None
    try:
        root = cache_subfolder("packed")
        work = Work(write, "packing the weights", "packs the weights of the model")
        entry = cached_folder(root / _key(config, folder), work, report)
        if made:
            _delete_unused(root)
    except _NotStorable:
        pass
    except CacheError as error:
        logger.warning("the packed weights are not stored: %s", error)
    mapped = None if entry is None or not kernels.available(report) else _mapped(entry)
    if mapped is None:
        return made[0] if made else make()
    facts, weights, size = mapped
    if not made:
        return Prepared(facts, weights, load_text(config, folder, facts.vocabulary, facts.end_ids), size)
    text = made.pop().text
    return_memory()
    return Prepared(facts, weights, text, size)


def _key(config: Model, folder: str) -> str:
    """A hash of all that the packed weights depend on: the model's files, the configuration, processor and code."""
    root = Path(folder)
    stats = [(path.name, path.stat()) for path in sorted(root.iterdir()) if path.is_file()]
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    parts = (
        str(root.resolve()),
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        str(choose_dtype(config.dtype, torch.device("cpu"), folder)),
        config.quantization,
        kernels.key(),
        version("transformers"),
        code.hexdigest(),
    )
    return f"{root.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def _mapped(entry: Path) -> tuple[ModelFacts, FusedWeights, int] | None:
    """The model of an entry and the size of its file; None if it is damaged or fails the self-test here."""
    try:
        facts, weights, size = _read(entry)
        fault = fused_fault(weights, facts.shapes, facts.test)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        fault = f"cannot be read: {error!r}"
    if fault is None:
        with suppress(OSError):
            (entry / _USED).touch()
        return facts, weights, size
    logger.warning("the packed weights in %s are not used: the model %s", entry, fault)
    delete(entry)
    return None


def _delete_unused(root: Path) -> None:
    """Delete entries that were not used for a long time: of other models, or of earlier versions of this package."""
    for used in root.glob(f"*/{_USED}"):
        with suppress(OSError):
            if time.time() - used.stat().st_mtime > _UNUSED_S:
                delete(used.parent)


class _Tensors:
    """The tensors of a file, each at a multiple of _ALIGNMENT. Tensors that share their memory are stored once."""

    def __init__(self) -> None:
        self.size = 0
        self.starts: dict[tuple[Any, ...], int] = {}
        self.tensors: list[tuple[int, torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> int:
        """The place of the tensor in the file, in bytes from its beginning."""
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in self.starts:
            self.starts[identity] = self.size
            self.tensors.append((self.size, tensor))
            self.size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return self.starts[identity]

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            for start, tensor in self.tensors:
                file.seek(start)
                tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
            file.truncate(self.size)


def _write(folder: Path, facts: ModelFacts, weights: FusedWeights) -> None:
    tensors = _Tensors()
    description = json.dumps([_described(facts, tensors), _described(weights, tensors)])
    require_space(folder.parent, tensors.size, "storing the packed weights")
    folder.mkdir()
    (folder / _DESCRIPTION).write_text(description)
    (folder / _USED).touch()
    tensors.write(folder / _WEIGHTS)


def _read(folder: Path) -> tuple[ModelFacts, FusedWeights, int]:
    path = folder / _WEIGHTS
    size = path.stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    facts, weights = (_restored(part, data) for part in json.loads((folder / _DESCRIPTION).read_text()))
    return facts, weights, size


def _described(value: Any, tensors: _Tensors) -> Any:
    """A value as JSON. An object is {its class: its fields}; a tensor is {"tensor": [type, shape, place]}."""
    if isinstance(value, torch.Tensor):
        return {"tensor": [_name(value.dtype), list(value.shape), tensors.add(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, STORABLE):
        return {type(value).__name__: {name: _described(part, tensors) for name, part in stored_fields(value).items()}}
    if is_dataclass(value):
        return {
            type(value).__name__: {
                field.name: _described(getattr(value, field.name), tensors) for field in fields(value)
            }
        }
    if isinstance(value, dict):
        return {"dict": {name: _described(part, tensors) for name, part in value.items()}}
    return [_described(part, tensors) for part in value] if isinstance(value, tuple) else value


def _restored(value: Any, data: torch.Tensor) -> Any:
    """The value that `_described` described, with its tensors in `data`."""
    if isinstance(value, list):
        return tuple(_restored(part, data) for part in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            dtype, shape, start = getattr(torch, content[0]), content[1], content[2]
            size = math.prod(shape) * dtype.itemsize
            return data[start : start + size].view(dtype).view(shape)
        case "dtype":
            return getattr(torch, content)
        case "device":
            return torch.device(content)
        case "dict":
            return {name: _restored(part, data) for name, part in content.items()}
    parts = {name: _restored(part, data) for name, part in content.items()}
    return _CLASSES[kind](**parts) if kind in _CLASSES else restored_layer(kind, parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
