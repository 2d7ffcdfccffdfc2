"""LoRA adapters with random weights for the benchmark (bench.py)."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq

import torch
from safetensors.torch import save

from serve_app.engines.adapters import LoadedAdapter
from serve_app.engines.files.adapter_files import AdapterFiles, LoraSettings
from serve_app.engines.native.forward import ForwardPass
from serve_app.engines.native.threads import one_thread


@one_thread()
def random_adapters(model: ForwardPass, count: int, rank: int, modules: Seq[str]) -> list[LoadedAdapter]:
    """`count` adapters of this rank that change the layers with these last names, such as `q_proj`."""
    settings = LoraSettings(rank, 1.0, False, {}, {})
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"base_model.model.{name}.lora_{factor}.weight": 0.01 * torch.randn(*shape, generator=generator)
            for name, target in model.targets.items()
            if name.rpartition(".")[2] in modules
            for factor, shape in (("A", (rank, target.inputs)), ("B", (target.outputs, rank)))
        }
        weights = model.make_adapter(AdapterFiles(settings, b"", save(tensors), str(number)))
        found.append(LoadedAdapter(str(number), weights, threading.Lock()))
    return found
