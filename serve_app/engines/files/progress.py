"""Estimates the time of a conversion on this machine, and reports its progress every 10 s."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from serve_app.engines.files.disk_cache import Report
from serve_app.engines.files.gguf_header import GgufHeader, TensorInfo

# Weights of one tensor that are converted, and written, to measure the speed.
_SAMPLE = 2**22
# transformers also copies the dequantized values into the model.
_COPIES = 1.5
# Seconds that gguf-py and transformers take for a string of the vocabulary, on a Sapphire Rapids.
_STRING_S = 5e-5


class Estimate(NamedTuple):
    """Seconds that it takes to read the vocabulary, to dequantize all weights, and to write them."""

    read: float
    dequantize: float
    write: float

    @property
    def total(self) -> float:
        return self.read + self.dequantize + self.write


class Progress:
    """The progress of one conversion into `folder`. The conversion counts the weights that it has `dequantized`."""

    def __init__(
        self, report: Report, folder: Path, weights: int, estimate: Estimate, interval_s: float = 10.0
    ) -> None:
        self.dequantized = 0
        self._interval_s = interval_s
        self._report = report
        self._folder = folder
        self._weights = weights
        self._estimate = estimate
        self._began = time.monotonic()

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Report the size and the estimated time now, then the progress every `interval_s` until the block ends."""
        size_mb = self._weights * 4 / 1e6
        self._report(f"converting the model file to {size_mb:,.1f} MB, about {_duration(self._estimate.total)}")
        ended = threading.Event()
        thread = threading.Thread(target=self._repeat, args=(ended,), name="conversion-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _repeat(self, ended: threading.Event) -> None:
        while not ended.wait(self._interval_s):
            self._report(f"converting the model file: {self._text(time.monotonic() - self._began)}")

    def _text(self, elapsed_s: float) -> str:
        expected = self._estimate
        done_s = expected.read if self.dequantized else min(elapsed_s, expected.read)
        done_s += expected.dequantize * min(self.dequantized / self._weights, 1.0)
        done_s += expected.write * min(_allocated_bytes(self._folder) / (4 * self._weights), 1.0)
        share = min(done_s / expected.total, 0.99)
        remaining_s = elapsed_s * (1 - share) / share if share else expected.total
        return f"{share:.0%}, about {_duration(remaining_s)} left"


def estimate(header: GgufHeader, folder: Path) -> Estimate:
    """The time of the conversion, from the time that a few million weights of each type of tensor take.

    `folder` is where the weights are written. Raises NotImplementedError for a type of tensor that gguf-py cannot
    dequantize.
    """
    largest: dict[gguf.GGMLQuantizationType, TensorInfo] = {}
    weights: dict[gguf.GGMLQuantizationType, int] = {}
    for info in header.tensors.values():
        largest[info.type] = max(largest.get(info.type, info), info, key=lambda one: one.size)
        weights[info.type] = weights.get(info.type, 0) + math.prod(info.shape)
    dequantize_s = sum(_dequantization_s(header.path, largest[kind]) * count for kind, count in weights.items())
    write_s = _write_s(folder) * sum(weights.values())
    return Estimate(_STRING_S * header.strings, _COPIES * dequantize_s, write_s)


def _dequantization_s(path: Path, info: TensorInfo) -> float:
    """Seconds per weight."""
    rows = math.prod(info.shape[:-1])
    sampled = min(rows, -(-_SAMPLE // info.shape[-1]))
    data = np.fromfile(path, np.uint8, info.size // rows * sampled, offset=info.start).reshape(sampled, -1)
    began = time.monotonic()
    size = gguf.dequantize(data, info.type).size
    return (time.monotonic() - began) / int(size)


def _write_s(folder: Path) -> float:
    """Seconds per float32 weight."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.monotonic()
        file.write(bytes(4 * _SAMPLE))
        return (time.monotonic() - began) / _SAMPLE


def _allocated_bytes(folder: Path) -> int:
    """The bytes on the disk: safetensors sets the length of a file before it writes the content."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # safetensors renames a file when it is complete
            total += path.stat().st_blocks * 512
    return total


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
