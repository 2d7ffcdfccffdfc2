"""Reads the header of a GGUF file, and refuses a file that is not whole: a part, a Git LFS pointer or a cut file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py's reader is not used, because it takes
seconds for a large vocabulary and does not read the header of a cut file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from serve_app.engines.files.model_files import SourceError, check_not_pointer

Value = int | float | bool | str

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# The formats of the values of fixed size, by the number of their type.
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_COUNT = struct.Struct("<Q")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class TensorInfo(NamedTuple):
    """A tensor of the file: its shape (rows first), its type, and where its bytes are in the file."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata of a GGUF file, without arrays, and its tensors by name.

    `strings` is the number of strings in the arrays: the tokens and the merges of the vocabulary.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    strings: int

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def weights(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def key(self, name: str) -> str:
        """The key of a value of the architecture: `llama.context_length` for `context_length`."""
        return f"{self.architecture}.{name}"

    def value(self, name: str) -> Value | None:
        return self.metadata.get(self.key(name))

    def number(self, name: str) -> float | None:
        """A value of the architecture. Raises SourceError if it is not a number."""
        value = self.value(name)
        if isinstance(value, str):
            raise SourceError(f"{self.path}: {self.key(name)} is not a number")
        return value

    def floats(self, name: str) -> list[float]:
        """The values of a tensor, for a small one. Raises SourceError if it is not float32."""
        info = self.tensors[name]
        if info.type is not gguf.GGMLQuantizationType.F32:
            raise SourceError(f"{self.path}: {name} has the type {info.type.name} instead of F32")
        values: list[float] = np.fromfile(self.path, "<f4", math.prod(info.shape), offset=info.start).tolist()
        return values


def read_header(path: Path) -> GgufHeader:
    """Raises SourceError for a file that is not GGUF, one part of a split file, a Git LFS pointer or a cut file."""
    check_not_pointer(path)
    actual = path.stat().st_size
    try:
        if not actual:
            raise EOFError  # mmap takes no empty file
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(path, data)
        _refuse_part(path, header.metadata)
    except (struct.error, EOFError):
        raise SourceError(
            f"{path} ends within its header, after {actual:,} bytes; copy or download the file again"
        ) from None
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise SourceError(f"{path} is not a GGUF file that can be read: {error}") from None
    expected = max((info.start + info.size for info in header.tensors.values()), default=0)
    if actual < expected:
        raise SourceError(f"{path} has {actual:,} bytes instead of {expected:,}; copy or download the file again")
    if "general.architecture" not in header.metadata:
        raise SourceError(f"{path} has no general.architecture, so that its kind of model is unknown; convert it again")
    return header


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    magic, version, tensor_count, value_count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ValueError("it does not begin with GGUF and version 2 or 3")
    cursor = _Cursor(data, 24)
    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key = cursor.string()
        value = cursor.value(cursor.integer())
        if value is not None:
            metadata[key] = value
    entries = [(cursor.string(), cursor.tensor()) for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {name: _info(name, *entry, data_start) for name, entry in entries}
    return GgufHeader(path, metadata, tensors, cursor.skipped_strings)


def _info(name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int) -> TensorInfo:
    try:
        tensor_type = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"the tensor {name} has the unknown type {kind}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    return TensorInfo(shape, tensor_type, data_start + offset, math.prod(shape) // block * block_bytes)


class _Cursor:
    """Reads values one after the other. Raises struct.error or EOFError at the end of the data."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data = data
        self.at = at
        self.skipped_strings = 0

    def integer(self) -> int:
        return int(self._scalar(_SCALARS[4]))

    def string(self) -> str:
        length = int(self._scalar(_COUNT))
        start, self.at = self.at, self.at + length
        if self.at > len(self._data):
            raise EOFError
        return self._data[start : self.at].decode()

    def value(self, kind: int) -> Value | None:
        """A value; None for an array, whose values are skipped."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            self._skip_array()
            return None
        if kind not in _SCALARS:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """The shape, the number of the type, and the offset from the start of the data."""
        dimensions = [int(self._scalar(_COUNT)) for _ in range(self.integer())]
        return tuple(reversed(dimensions)), self.integer(), int(self._scalar(_COUNT))

    def _skip_array(self) -> None:
        kind, count = self.integer(), int(self._scalar(_COUNT))
        if kind in _SCALARS:
            self.at += count * _SCALARS[kind].size
            return
        if kind != _STRING:
            for _ in range(count):
                self.value(kind)
            return
        data, unpack, at = self._data, _COUNT.unpack_from, self.at
        for _ in range(count):  # the vocabulary: several 100,000 strings
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.skipped_strings += count

    def _scalar(self, form: struct.Struct) -> Value:
        (value,) = form.unpack_from(self._data, self.at)
        self.at += form.size
        return value  # type: ignore[no-any-return]


def _refuse_part(path: Path, metadata: dict[str, Value]) -> None:
    """Raises SourceError for one of several files that llama-gguf-split wrote."""
    named = _PART.fullmatch(path.name)
    count = int(metadata.get("split.count", named[3] if named else 1))
    if count <= 1:
        return
    number = int(metadata.get("split.no", int(named[2]) - 1 if named else 0)) + 1
    stem = named[1] if named else path.stem
    first = path.with_name(f"{stem}-00001-of-{count:05}.gguf")
    merged = path.with_name(f"{stem}.gguf" if named else "merged.gguf")
    raise SourceError(
        f"{path} is part {number} of {count} of a model; merge the parts and set source to the result: "
        f"llama-gguf-split --merge {first} {merged}"
    )
