"""4-bit weight quantization: for each group of weights, chooses the scale and the zero with the least output error."""

from __future__ import annotations

import torch

# The smallest group that torch's kernel supports: 5 bits per weight with scale and zero. 64: 4.5 bits, more loss.
GROUP = 32
_MAX_LEVEL, _MID_LEVEL = 15, 8
# Shares of a group's range that the levels are tried on. A smaller share clips the extremes and is finer in between.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# Least importance of a channel, as a share of the mean: for channels that the calibration text did not activate.
_FLOOR = 0.01


def supports(shape: torch.Size) -> bool:
    """Whether torch's kernel can multiply with a weight `[N, K]` of this shape."""
    return shape[0] % 16 == 0 and shape[1] % GROUP == 0


def quantize(weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` -> levels `[N, K]` int32 in 0..15, and scales and zeros `[K / GROUP, N, 2]` bfloat16.

    A weight is dequantized as `(level - 8) * scale + zero`. For each group the function tries several ranges. For each
    range it fits scale and zero to the levels by least squares, rounds them to bfloat16 and chooses the levels again.
    The range with the least sum of squared errors wins. An error is weighted by the `importance` `[K]` of its channel,
    the mean square of the channel's inputs. The weighting is that of llama.cpp's importance matrix; without it the
    KL divergence of a small model is four times as large.
    """
    rows, width = weight.shape
    w = weight.float().view(rows, width // GROUP, GROUP)
    cost = _cost(importance, width)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    least, best = torch.full_like(low, torch.inf), torch.zeros(rows, width // GROUP, 2)
    for share in _SHARES:
        scale = (high - low) * (share / _MAX_LEVEL)
        fitted = _fit(w, _levels(w, scale, (high + low + scale) / 2), cost)
        scale, zero = fitted[..., :1], fitted[..., 1:]
        errors = (_levels(w, scale, zero) - _MID_LEVEL).mul_(scale).add_(zero).sub_(w)
        error = errors.square_().mul_(cost).sum(-1, keepdim=True)
        best = torch.where(error < least, fitted, best)
        least = torch.minimum(error, least)
    levels = _levels(w, best[..., :1], best[..., 1:])
    return levels.view(rows, width).int(), best.transpose(0, 1).bfloat16().contiguous()


def _cost(importance: torch.Tensor | None, width: int) -> torch.Tensor:
    """The weight of each channel's error, `[K / GROUP, GROUP]`, with mean 1 in each group."""
    cost = torch.ones(width) if importance is None else importance + _FLOOR * importance.mean() + 1e-30
    cost = cost.view(-1, GROUP)
    return cost / cost.mean(-1, keepdim=True)


def _levels(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((w - zero) / scale.clamp_min(1e-12)).add_(_MID_LEVEL).round_().clamp_(0, _MAX_LEVEL)


def _fit(w: torch.Tensor, levels: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Scale and zero `[N, K / GROUP, 2]` with bfloat16 values that dequantize these levels with the least cost."""
    mean, mean_level = (w * cost).mean(-1, keepdim=True), (levels * cost).mean(-1, keepdim=True)
    spread = (levels - mean_level).mul_(cost)
    covariance, variance = ((spread * y).sum(-1, keepdim=True) for y in (w, levels))
    scale = (covariance / variance.clamp_min(1e-12)).bfloat16().float()
    return torch.cat([scale, (mean - (mean_level - _MID_LEVEL) * scale).bfloat16().float()], -1)
