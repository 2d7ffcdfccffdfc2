"""Chooses the device and the data type of a model."""

from __future__ import annotations

import torch

from serve_app.engines.files.model_files import SourceError


def choose_device(wanted: str, num_gpus: float) -> torch.device:
    """`auto`: the GPU that the replica reserved from Ray, if torch can use it.

    A replica without a reservation uses the CPU, although Ray does not hide the GPUs from it.
    """
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise SourceError("device: cuda, but torch finds no GPU; use device: auto, or set resources.num_gpus")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and num_gpus > 0 and usable) else "cpu")


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype | str:
    """`auto`: the checkpoint's dtype on a GPU; on CPU bfloat16 if the processor multiplies bfloat16, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type == "cuda":
        return "auto"
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512-BF16 or AMX). On others bfloat16 is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
