"""Starts vLLM for a model: its files, its text processing, and vLLM's processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from transformers import GenerationConfig

from serve_app.config import Model, VllmOptions
from serve_app.engines.files.disk_cache import CacheError, cache_subfolder, locked
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.files.text import configured_ends, load_text
from serve_app.engines.text.tokenizer import HFText
from serve_app.engines.vllm.adapter import Client, engine_args

# The time in which another replica of the node starts, with a compilation that takes most of an hour.
_START_TIMEOUT_S = 3600.0


def load(model: Model, options: VllmOptions, folder: str, report: Callable[[str], None]) -> tuple[Client, HFText]:
    """vLLM with the model in `folder`, and its text processing. Raises SourceError if vLLM cannot be started."""
    args = engine_args(model, options, folder)
    cache = _set_environment()
    report("starting vLLM")
    try:
        # vLLM's caches of compiled code are damaged if two replicas of a node write them at the same time.
        with locked(cache / "start.lock", "starts vLLM", _START_TIMEOUT_S, report):
            client = Client(args)
    except CacheError:
        raise
    except Exception as error:
        raise SourceError(f"{model.source}: vLLM cannot be started: {error}") from error
    try:
        ends = configured_ends(_generation_config(folder), model.source)
        return client, load_text(model, folder, client.vocabulary, ends)
    except BaseException:
        client.shutdown()
        raise


def _set_environment() -> Path:
    """Set vLLM's switches and return the folder of its caches, in the cache folder of this service.

    vLLM reads its switches when it starts; values that the user has set are kept.
    """
    cache = cache_subfolder("vllm")
    cache.mkdir(parents=True, exist_ok=True)
    for name, value in {"VLLM_CACHE_ROOT": str(cache), "VLLM_NO_USAGE_STATS": "1"}.items():
        os.environ.setdefault(name, value)
    return cache


def _generation_config(folder: str) -> GenerationConfig | None:
    """The model's own generation settings; None if it has no file of them."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
