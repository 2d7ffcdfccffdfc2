"""The time of a step of the embedded model relative to plain torch on the same shapes, measured in turn.

The stored ratios were measured on two cores with AVX512-BF16 and AVX512-VNNI. A change that makes a step 1.5 times as
slow fails this test on any such processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from serve_app.engines.native.quantization import Quantization
from serve_app.engines.native.rows import DecodeRun, Rows
from serve_app.engines.native.runner import TorchRunner
from tests.models.concurrent_load import model_config

pytestmark = [pytest.mark.model, pytest.mark.long, pytest.mark.timeout(240)]

# By rows and quantization: the time of a step divided by the time of F.linear in bfloat16 over the linear layers.
STORED: dict[tuple[int, Quantization], float] = {
    (1, "none"): 0.65,
    (8, "none"): 0.65,
    (1, "int8"): 0.40,
    (8, "int8"): 0.45,
}
SLACK = 1.5
# Outputs and inputs of the four linear layers in each of the model's 30 layers.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
HEAD = (49152, 576)


def best_of_each(works: list[Callable[[], object]], rounds: int = 60) -> list[float]:
    """The least time of each, measured in turn so that other load affects all alike."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for number, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - began)
    return best


def plain_torch(inputs: dict[int, torch.Tensor], weights: list[torch.Tensor]) -> None:
    for weight in weights:
        F.linear(inputs[weight.shape[1]], weight)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_time_of_a_step_relative_to_plain_torch_has_not_grown(quantization: Quantization) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("the reference runs in bfloat16, which this processor does not multiply")
    config = model_config("builtin:smollm2-135m", max_running=8, max_context=512)
    config = config.model_copy(update={"dtype": "bfloat16", "quantization": quantization})
    runner = TorchRunner.from_config(config, lambda stage: None)
    weights = [torch.randn(shape).bfloat16() for _ in range(30) for shape in SHAPES] + [torch.randn(HEAD).bfloat16()]
    for rows in (1, 8):
        inputs = {width: torch.randn(rows, width).bfloat16() for width in (576, 1536)}
        step = Rows([5] * rows, list(range(rows)), [64] * rows, list(range(rows)), [DecodeRun(0, 0, (64,) * rows)], [])
        with torch.inference_mode():
            ours, plain = best_of_each([partial(runner._model.forward, step), partial(plain_torch, inputs, weights)])
        print(f"{quantization}, {rows} rows: {ours / plain:.2f} of plain torch, stored {STORED[rows, quantization]}")
        assert ours / plain <= SLACK * STORED[rows, quantization]
