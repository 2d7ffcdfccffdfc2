"""Linear layers on CPU that replace torch.nn.Linear. Each holds one copy of its weights, packed for its kernel."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F

from serve_app.engines.native import int4
from serve_app.engines.native.quantization import Quantization


class _UnscaledLinear(torch.nn.Module):
    """A layer whose input rows have no multipliers, unlike those of the quantized layers of matmul.h."""

    def scaled(self, rows: torch.Tensor, row_scales: torch.Tensor | None) -> torch.Tensor:
        """`[N, K]` -> `[N, M]`."""
        assert row_scales is None, "this layer takes unscaled rows"
        y: torch.Tensor = self(rows)
        return y


class OneDnnLinear(_UnscaledLinear):
    """bfloat16 by oneDNN with prepacked weights: 1.7 times as fast as F.linear at one row, 1.25 times at 32 rows.

    The operations are private ones that torch's compiler calls, so that `pack` tries them before it uses them.
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


class DotProductLinear(_UnscaledLinear):
    """bfloat16 weights by matmul.h, with float32 rows and float32 sums.

    With AVX512-BF16 rows are rounded to bfloat16 for the products. Other processors widen the weights in registers.
    Takes 0.8 times the time of oneDNN up to 64 rows with AVX512-BF16. Also used where the processor has AMX tiles: with
    tiles the result of oneDNN for a row depends on the number of rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.weight = torch.ops.serve_app.pack_strips(weight)
        self.bias = None if bias is None else bias.float()
        self.weight_bytes = weight.numel() * weight.itemsize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        y: torch.Tensor = torch.ops.serve_app.linear_bfloat16(rows, self.weight, self.bias, self.out_features)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class FbgemmInt8Linear(_UnscaledLinear):
    """int8 weights with a scale per output, and rows that are quantized to 8 bits, by fbgemm (W8A8).

    torch's operation quantizes all rows of a call with one scale, so that an outlier in one row would reduce the
    precision of the others. Each row is therefore scaled to [-1, 1] first, and an additional last row of alternating +1
    and -1 fixes the scale: the result of a row does not depend on other rows. Without AVX512-VNNI fbgemm adds two
    products in 16 bits, which overflows with 8-bit rows (the logits of a model then had a median cosine of 0.86 with
    the exact ones). On such processors each row is multiplied twice: rounded to 7 bits, and the remainder in 7 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # The operation is deprecated, but it is the only way to fbgemm. The version of torch is pinned.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        torch.backends.quantized.engine = "fbgemm"
        self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if bias is None else bias.float()
        self._pin = torch.ones(weight.shape[1])
        self._pin[::2] = -1
        self.multiply_twice = not torch.cpu._is_vnni_supported()
        self.weight_bytes = weight.numel() + 4 * len(scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        count = rows.shape[0]
        scales = rows.abs().amax(-1).clamp_min_(1e-20)
        scaled = rows.new_empty(count + 1, rows.shape[1])
        torch.div(rows, scales[:, None], out=scaled[:count])
        scaled[count] = self._pin
        y = self._product(scaled)[:count].mul_(scales[:, None])
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        product: Any = torch.ops.quantized.linear_dynamic
        if not self.multiply_twice:
            return product(rows, self.weight, False)  # type: ignore[no-any-return]
        plain, pin = rows[:-1], rows[-1:]
        # [-1, 1] in 7 bits has steps of 2 / 127. A remainder one ulp above 1 would change the scale of the whole call.
        high = (plain * 63.5).round_().clamp_(-63, 63).div_(63.5)
        rest = (plain - high).mul_(127).clamp_(-1, 1)
        y: torch.Tensor = product(torch.cat([high, rest, pin]), self.weight, True)
        y[: len(plain)].add_(y[len(plain) : -1], alpha=1 / 127)
        return y[: len(rows)]


class Int8DotProductLinear(torch.nn.Module):
    """W8A8 as in FbgemmInt8Linear, by matmul.h: each row has its own scale, and a call takes two thirds of the time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        levels = (weight / scales[:, None]).round_().add_(128).to(torch.uint8)
        self.weight = torch.ops.serve_app.pack_strips(levels)
        self.scales = scales / 127  # the kernel reads rows in [-1, 1] as integers up to 127
        self.bias = None if bias is None else bias.float()
        self.weight_bytes = weight.numel() + self.scales.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`, in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        row_scales = rows.abs().amax(-1).clamp_min_(1e-20)
        y = self.scaled(rows / row_scales[:, None], row_scales)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def scaled(self, rows: torch.Tensor, row_scales: torch.Tensor | None) -> torch.Tensor:
        """Rows in [-1, 1] and their multipliers, `[N, K]` and `[N]`, -> `[N, M]`. Without multipliers, any rows."""
        if row_scales is None:
            return self(rows)  # type: ignore[no-any-return]
        y: torch.Tensor = torch.ops.serve_app.linear_quantized(rows, self.weight, self.scales, self.bias, row_scales)
        return y


class Int4DotProductLinear(Int8DotProductLinear):
    """Int8DotProductLinear whose weights are stored in 4 bits (int4.py), so that a step reads half of the bytes."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, importance: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features = weight.shape[0]
        quantized = int4.quantize(weight, importance)
        self.weight = int4.packed(quantized)
        self.scales = quantized.scales / 127
        self.bias = None if bias is None else bias.float()
        self.weight_bytes = self.weight.nbytes + self.scales.nbytes


class PlainLinear(_UnscaledLinear):
    """F.linear with the given weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.weight = weight
        self.bias = bias
        self.weight_bytes = weight.numel() * weight.itemsize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`."""
        return F.linear(x, self.weight, self.bias)


Linear = DotProductLinear | OneDnnLinear | Int8DotProductLinear | FbgemmInt8Linear | PlainLinear

# The layers whose packed weights are plain tensors. oneDNN and fbgemm have formats of their own.
STORABLE = (DotProductLinear, Int8DotProductLinear, Int4DotProductLinear, PlainLinear)
_FIELDS = ("weight", "scales", "bias", "out_features", "weight_bytes")


def stored_fields(layer: torch.nn.Module) -> dict[str, Any]:
    """The packed tensors and the numbers of a storable layer, for `restored_layer`."""
    return {name: getattr(layer, name) for name in _FIELDS if hasattr(layer, name)}


def restored_layer(kind: str, fields: dict[str, Any]) -> Linear:
    """The layer of the class named `kind` with these fields, without packing its weights again."""
    cls = next(cls for cls in STORABLE if cls.__name__ == kind)
    layer: Any = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    for name in _FIELDS:
        if name in fields:
            setattr(layer, name, fields[name])
    return cast("Linear", layer)


def pack(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantization: Quantization,
    importance: torch.Tensor | None = None,
) -> Linear:
    """The fastest layer that computes `x @ weight.T + bias` with this quantization on this processor.

    `importance` `[K]` of the channels: see int4.quantize. Weights that do not consist of whole groups are quantized to
    int8, and so are all weights without the native operations.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    native = _has_products() and weight.shape[1] % 4 == 0
    if quantization == "int4" and native and int4.supports(weight.shape):
        return Int4DotProductLinear(weight, bias, importance)
    if quantization != "none":
        return Int8DotProductLinear(weight, bias) if native else FbgemmInt8Linear(weight, bias)
    if native and weight.dtype == torch.bfloat16:
        return DotProductLinear(weight, bias)
    if weight.dtype == torch.bfloat16 and _onednn_works():
        return OneDnnLinear(weight, bias)
    return PlainLinear(weight, bias)


def head_quantization(quantization: Quantization) -> Quantization:
    """The quantization of the head. 4 bits in the head lose more quality than in all other layers together."""
    return "int8" if quantization == "int4" else quantization


def attach_importance(importance: dict[torch.nn.Module, torch.Tensor]) -> None:
    """Store the importance of its channels in each layer, for a later `pack`."""
    for linear, channels in importance.items():
        linear.serve_app_importance = channels


def attached_importance(linear: torch.nn.Module) -> torch.Tensor | None:
    """The importance that `attach_importance` stored; None if it stored none: all channels count the same."""
    return getattr(linear, "serve_app_importance", None)


def replace_linears(model: torch.nn.Module, quantization: Quantization, head: torch.nn.Module | None = None) -> None:
    """Replace each torch.nn.Linear in `model` by the result of `pack`; the original weights are freed."""
    for name, child in model.named_children():
        if type(child) is torch.nn.Linear:
            wanted = head_quantization(quantization) if child is head else quantization
            setattr(model, name, pack(child.weight, child.bias, wanted, attached_importance(child)))
        else:
            replace_linears(child, quantization, head)


def _has_products() -> bool:
    """Whether the native operations are loaded."""
    return hasattr(torch.ops.serve_app, "linear_quantized")


@cache
def _onednn_works() -> bool:
    """Whether the private operations of OneDnnLinear exist and work on this processor."""
    try:
        x, weight = torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(16, 32, dtype=torch.bfloat16)
        return bool((OneDnnLinear(weight, None)(x) == 32).all())
    except (AttributeError, RuntimeError):
        return False
