"""Chooses the device and the data type of a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native import kernels
from serve_app.engines.native.families import FAMILIES
from serve_app.engines.native.machine import processor_flags


def choose_device(wanted: str, num_gpus: float) -> torch.device:
    """`auto`: the GPU that the replica reserved from Ray, if torch can use it.

    A replica without a reservation uses the CPU, although Ray does not hide the GPUs from it.
    """
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise SourceError("device: cuda, but torch finds no GPU; use device: auto, or set resources.num_gpus")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and num_gpus > 0 and usable) else "cpu")


def choose_dtype(wanted: str, device: torch.device, folder: str | Path) -> torch.dtype | str:
    """The data type of the model with its files in `folder`.

    `auto` is the checkpoint's on a GPU. On CPU it is bfloat16 if the processor multiplies bfloat16, or if the model
    runs on the fused path, whose products widen bfloat16 in registers; else float32.
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type == "cuda":
        return "auto"
    return torch.bfloat16 if cpu_multiplies_bfloat16() or _may_run_fused(Path(folder)) else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16. On others torch takes longer for bfloat16 than for float32."""
    return "avx512_bf16" in processor_flags()


def _may_run_fused(folder: Path) -> bool:
    """Whether the fused path supports this type of model, as far as its configuration tells before it is loaded."""
    try:
        described = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("model_type") in FAMILIES and kernels.expected()
