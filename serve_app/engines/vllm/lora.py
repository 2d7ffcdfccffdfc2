"""Copies of LoRA adapters for vLLM, one for each content.

vLLM reads an adapter's files when it first needs them, and again when it has evicted the adapter. A copy that never
changes holds it to the content whose digest the request has.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from serve_app.config import Lora
from serve_app.core.requests import Adapter
from serve_app.engines.files.adapter_files import CONFIG, WEIGHTS, check_fit, read_adapter


@dataclass(frozen=True, slots=True)
class AdapterCopy:
    """The copy in `folder`. vLLM knows the content by the `digest` and by the `number`, which no other content has."""

    digest: str
    number: int
    folder: Path


class AdapterCopies:
    """The copies of one engine. `drop` removes one, and `close` all."""

    def __init__(self, options: Lora) -> None:
        self._options = options
        self._model: Path | None = None
        self._numbers = itertools.count(1)
        self._folder = TemporaryDirectory(prefix="serve_app-lora-")

    def check_against(self, model: Path) -> None:
        """Refuse adapters that do not fit the weights of the model in this folder: vLLM would cut or fill them."""
        self._model = model

    def load(self, adapter: Adapter) -> tuple[str, object]:
        """The digest of an adapter's files, and their copy. Raises ServeAppError."""
        files = read_adapter(adapter, self._options)
        if self._model is not None:
            check_fit(files, self._model)
        number = next(self._numbers)
        folder = Path(self._folder.name) / str(number)
        folder.mkdir()
        (folder / CONFIG).write_bytes(files.config)
        (folder / WEIGHTS).write_bytes(files.weights)
        return files.digest, AdapterCopy(files.digest, number, folder)

    def drop(self, copy: object) -> None:
        assert isinstance(copy, AdapterCopy)
        shutil.rmtree(copy.folder, ignore_errors=True)

    def close(self) -> None:
        self._folder.cleanup()
