"""Linear layers on CPU, each with one packed copy of its weights, in place of torch.nn.Linear."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

Quantization = Literal["none", "int8"]


class PackedLinear(torch.nn.Module):
    """bfloat16 through oneDNN with weights laid out beforehand: 1.7 times F.linear at one row, 1.25 at 32.

    The operations are those that torch's compiler calls; `pack` uses them only after a trial.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        self.bias = bias
        self.weight_bytes = weight.numel() * weight.itemsize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert scales is None, "these rows are what they are"
        return self(rows), None


class Int8Linear(torch.nn.Module):
    """Weights in int8 with a scale a channel, rows quantised to 8 bits on the way in (fbgemm, W8A8).

    torch's operation takes one scale for all rows of a call, so that one row's outlier would ruin its neighbours.
    Every row is therefore scaled to [-1, 1] first, and a last row of alternating +1 and -1 pins the scale: no row's
    result depends on another's.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # Of the kernels' only door; torch is pinned, and `pack` is where another one would be tried.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        torch.backends.quantized.engine = "fbgemm"
        self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if bias is None else bias.float()
        self._pin = torch.ones(weight.shape[1])
        self._pin[::2] = -1
        self.weight_bytes = weight.numel() + 4 * len(scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        count = rows.shape[0]
        scales = rows.abs().amax(-1).clamp_min_(1e-20)
        scaled = rows.new_empty(count + 1, rows.shape[1])
        torch.div(rows, scales[:, None], out=scaled[:count])
        scaled[count] = self._pin
        y, left = self.scaled(scaled, scales)
        y = y[:count] if left is None else y[:count].mul_(left[:, None])
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows in [-1, 1] and the pinning one, `[N + 1, K]`, and N multipliers -> `[N + 1, M]`, multipliers left."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic(rows, self.weight, False)
        if self.bias is None or scales is None:
            return y, scales
        y[:-1].mul_(scales[:, None]).add_(self.bias)
        return y, None


class PlainLinear(torch.nn.Module):
    """As it came."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.weight = weight
        self.bias = bias
        self.weight_bytes = weight.numel() * weight.itemsize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert scales is None, "these rows are what they are"
        return self(rows), None


Linear = PackedLinear | Int8Linear | PlainLinear
# Kinds that kernels.cpp's loop over the layers can call.
NATIVE = (PackedLinear, Int8Linear, PlainLinear)


def pack(weight: torch.Tensor, bias: torch.Tensor | None, quantization: Quantization) -> Linear:
    """The fastest layer that computes `x @ weight.T + bias` with weights of this kind on this processor."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if quantization == "int8":
        return Int8Linear(weight, bias)
    if weight.dtype == torch.bfloat16 and _packs_bfloat16():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def swap(model: torch.nn.Module, quantization: Quantization) -> None:
    """Replace every torch.nn.Linear below `model` by a packed one, and let its weights go."""
    for name, child in model.named_children():
        if type(child) is torch.nn.Linear:
            setattr(model, name, pack(child.weight, child.bias, quantization))
        else:
            swap(child, quantization)


@cache
def _packs_bfloat16() -> bool:
    """A trial of the private operations: they may be missing, or refuse this processor."""
    try:
        x, weight = torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(16, 32, dtype=torch.bfloat16)
        return bool((PackedLinear(weight, None)(x) == 32).all())
    except (AttributeError, RuntimeError):
        return False
