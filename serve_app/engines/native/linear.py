"""Linear layers on CPU, each with one packed copy of its weights, in place of torch.nn.Linear."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F

from serve_app.engines.native import int4

Quantization = Literal["none", "int8", "int4"]


class _AsItIs(torch.nn.Module):
    """A layer that reads rows as they are, where Int8Linear wants scaled ones."""

    def scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert scales is None, "these rows are what they are"
        return self(rows), None


class PackedLinear(_AsItIs):
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


class DotLinear(_AsItIs):
    """bfloat16 through matmul.h, for rows of floats, which only the products round: 0.8 times oneDNN's time to 64 rows.

    For processors with dot products of bfloat16 vectors, also where there are tiles (AMX): with those oneDNN rounds a
    row by the number of its neighbours.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.weight = torch.ops.serve_app.strips(weight)
        self.bias = None if bias is None else bias.float()
        self.weight_bytes = weight.numel() * weight.itemsize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        y: torch.Tensor = torch.ops.serve_app.linear_bfloat16(rows, self.weight, self.bias, self.out_features)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class Int8Linear(torch.nn.Module):
    """Weights in int8 with a scale a channel, rows quantised to 8 bits on the way in (fbgemm, W8A8).

    torch's operation takes one scale for all rows of a call, so that one row's outlier would ruin its neighbours.
    Every row is therefore scaled to [-1, 1] first, and a last row of alternating +1 and -1 pins the scale: no row's
    result depends on another's. Without VNNI fbgemm adds two products in 16 bits, in which those of 8 bits do not fit
    (a model's logits then had a median cosine of 0.86 with the exact ones). There every row goes in twice: in 7 bits,
    and what those leave, again in 7 bits.
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
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows in [-1, 1] and the pinning one, `[N + 1, K]`, and N multipliers -> `[N + 1, M]`, multipliers left.

        Without multipliers (a layer of a model that is not int8 elsewhere) the rows are plain, in and out.
        """
        if scales is None:
            return self(rows), None
        y = self._product(rows)
        if self.bias is None:
            return y, scales
        y[:-1].mul_(scales[:, None]).add_(self.bias)
        return y, None

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        product: Any = torch.ops.quantized.linear_dynamic
        if torch.cpu._is_vnni_supported():
            return product(rows, self.weight, False)  # type: ignore[no-any-return]
        plain, pin = rows[:-1], rows[-1:]
        # [-1, 1] in 7 bits is steps of 2 / 127. A rest an ulp above 1 would move the scale of the whole call.
        high = (plain * 63.5).round_().clamp_(-63, 63).div_(63.5)
        rest = (plain - high).mul_(127).clamp_(-1, 1)
        y: torch.Tensor = product(torch.cat([high, rest, pin]), self.weight, True)
        y[: len(plain)].add_(y[len(plain) : -1], alpha=1 / 127)
        return y[: len(rows)]


class Int8DotLinear(torch.nn.Module):
    """As Int8Linear, through matmul.h: every row has a scale of its own, and a call takes two thirds of the time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        levels = (weight / scales[:, None]).round_().add_(128).to(torch.uint8)
        self.weight = torch.ops.serve_app.strips(levels)
        self.lines = scales / 127  # rows in [-1, 1] are read as whole numbers up to 127
        self.bias = None if bias is None else bias.float()
        self.weight_bytes = weight.numel() + self.lines.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        scales = rows.abs().amax(-1).clamp_min_(1e-20)
        y, _ = self.scaled(rows / scales[:, None], scales)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows in [-1, 1], `[>= N, K]`, and N multipliers -> `[N, M]`, with nothing left to multiply."""
        if scales is None:
            return self(rows), None
        return torch.ops.serve_app.linear_int8(rows, self.weight, self.lines, self.bias, scales), None


class Int4Linear(_AsItIs):
    """Weights in 4 bits by groups (int4.py), rows in bfloat16, sums in float32; a row's result is its own.

    torch's kernel has vector code for bfloat16 rows only: float32 ones take 60 times as long, so they are rounded.
    Its time grows with the rows from the fourth on: faster than int8 up to four of them, slower than bfloat16 from 16.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, importance: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        levels, self.lines = int4.quantize(weight, importance)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        self.bias = None if bias is None else bias.bfloat16()
        self.weight_bytes = self.weight.nbytes + self.lines.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, int4.GROUP, self.lines)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class PlainLinear(_AsItIs):
    """As it came."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.weight = weight
        self.bias = bias
        self.weight_bytes = weight.numel() * weight.itemsize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


Linear = DotLinear | PackedLinear | Int8DotLinear | Int8Linear | Int4Linear | PlainLinear


def pack(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantization: Quantization,
    importance: torch.Tensor | None = None,
) -> Linear:
    """The fastest layer that computes `x @ weight.T + bias` with weights of this kind on this processor.

    `importance` of the K channels: see int4.quantize. What int4's kernel does not take becomes int8.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if quantization == "int4" and int4.takes(weight.shape) and _packs_int4():
        return Int4Linear(weight, bias, importance)
    in_strips = _has_dots() and weight.shape[1] % 16 == 0
    if quantization != "none":
        return Int8DotLinear(weight, bias) if in_strips else Int8Linear(weight, bias)
    if in_strips and weight.dtype == torch.bfloat16:
        return DotLinear(weight, bias)
    if weight.dtype == torch.bfloat16 and _packs_bfloat16():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def of_head(quantization: Quantization) -> Quantization:
    """What the layer that makes the logits gets. 4 bits there cost more than in all other layers together."""
    return "int8" if quantization == "int4" else quantization


def mark(importance: dict[torch.nn.Module, torch.Tensor]) -> None:
    """Leave with each layer, for when it is packed, how much its channels count."""
    for linear, channels in importance.items():
        linear.serve_app_importance = channels


def importance_of(linear: torch.nn.Module) -> torch.Tensor | None:
    """None: nothing is known, all channels count the same."""
    return getattr(linear, "serve_app_importance", None)


def swap(model: torch.nn.Module, quantization: Quantization, head: torch.nn.Module | None = None) -> None:
    """Replace every torch.nn.Linear below `model` by a packed one, and let its weights go."""
    for name, child in model.named_children():
        if type(child) is torch.nn.Linear:
            wanted = of_head(quantization) if child is head else quantization
            setattr(model, name, pack(child.weight, child.bias, wanted, importance_of(child)))
        else:
            swap(child, quantization, head)


def _has_dots() -> bool:
    """Whether matmul.h has code for this processor."""
    native = torch.ops.serve_app
    return hasattr(native, "has_dots") and native.has_dots()


@cache
def _packs_bfloat16() -> bool:
    """A trial of the private operations: they may be missing, or refuse this processor."""
    try:
        x, weight = torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(16, 32, dtype=torch.bfloat16)
        return bool((PackedLinear(weight, None)(x) == 32).all())
    except (AttributeError, RuntimeError):
        return False


@cache
def _packs_int4() -> bool:
    """Likewise."""
    try:
        return bool((Int4Linear(torch.ones(16, 32), None, None)(torch.ones(2, 32)) == 32).all())
    except (AttributeError, RuntimeError):
        return False
