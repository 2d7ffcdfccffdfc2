"""Weights in 4 bits: for every group of neighbours in a row, the scale and the middle that cost the result least."""

from __future__ import annotations

import torch

# The smallest group that torch's kernel takes: 5 bits a weight with its scale and middle. 64: 4.5 bits, and more loss.
GROUP = 32
_TOP, _HALF = 15, 8
# How much of a group's range is spread over the levels. Giving up the ends sharpens what lies between them.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# Channels that the text left silent count a little too; a share of the mean.
_FLOOR = 0.01


def takes(shape: torch.Size) -> bool:
    """Whether a weight `[N, K]` of this shape can be packed for torch's kernel."""
    return shape[0] % 16 == 0 and shape[1] % GROUP == 0


def quantize(weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` -> levels `[N, K]` int32 in 0..15, and `[K / GROUP, N, 2]` bfloat16 of scales and middles.

    A weight is read as `(level - 8) * scale + middle`. Each group tries several ranges; for each, a line is fitted to
    its levels by least squares, rounded to what is kept of it, and the levels are chosen anew; the least sum of squares
    wins. An error counts by the `importance` `[K]` of its channel, the mean square of what it is multiplied with (the
    weighting of llama.cpp's importance matrix; without it a small model's divergence is four times as large).
    """
    rows, width = weight.shape
    w = weight.float().view(rows, width // GROUP, GROUP)
    cost = _cost(importance, width)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    least, best = torch.full_like(low, torch.inf), torch.zeros(rows, width // GROUP, 2)
    for share in _SHARES:
        scale = (high - low) * (share / _TOP)
        line = _fitted(w, _levels(w, scale, (high + low + scale) / 2), cost)
        scale, middle = line[..., :1], line[..., 1:]
        errors = (_levels(w, scale, middle) - _HALF).mul_(scale).add_(middle).sub_(w)
        error = errors.square_().mul_(cost).sum(-1, keepdim=True)
        best = torch.where(error < least, line, best)
        least = torch.minimum(error, least)
    levels = _levels(w, best[..., :1], best[..., 1:])
    return levels.view(rows, width).int(), best.transpose(0, 1).bfloat16().contiguous()


def _cost(importance: torch.Tensor | None, width: int) -> torch.Tensor:
    """`[K / GROUP, GROUP]`, of mean 1 in each group."""
    cost = torch.ones(width) if importance is None else importance + _FLOOR * importance.mean() + 1e-30
    cost = cost.view(-1, GROUP)
    return cost / cost.mean(-1, keepdim=True)


def _levels(w: torch.Tensor, scale: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    return ((w - middle) / scale.clamp_min(1e-12)).add_(_HALF).round_().clamp_(0, _TOP)


def _fitted(w: torch.Tensor, levels: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """The scale and the middle, of bfloat16 values, `[N, K / GROUP, 2]`, that read these levels with the least cost."""
    mean, mean_level = (w * cost).mean(-1, keepdim=True), (levels * cost).mean(-1, keepdim=True)
    spread = (levels - mean_level).mul_(cost)
    covariance, variance = ((spread * y).sum(-1, keepdim=True) for y in (w, levels))
    scale = (covariance / variance.clamp_min(1e-12)).bfloat16().float()
    return torch.cat([scale, (mean - (mean_level - _HALF) * scale).bfloat16().float()], -1)
