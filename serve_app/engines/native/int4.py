"""4-bit weight quantization in two steps: chooses the scales and the levels with the least output error.

The weights of an output are integers of 8 bits with one scale, as in int8. A group of 32 of them is stored as levels of
4 bits, a multiplier and an offset, from which the integers are computed exactly. So the products are those of int8
(progressive group quantization of QServe: Lin et al. 2024, arXiv 2405.04532). QServe's multipliers are integers;
eighths reduce the KL divergence of a model whose weights are 4-bit groups from 0.014 to 0.004.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GROUP = 32
_MAX_LEVEL, _LARGEST, _EIGHTH = 15, 127, 8
# Shares of a group's range that the levels are tried on. A smaller share clips the extremes and is finer in between.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# Least importance of a channel, as a share of the mean: for channels that the calibration text did not activate.
_FLOOR = 0.01
_OUTPUTS, _LINE = 16, 8  # outputs of a strip, elements of a line: matmul.h


class Quantized(NamedTuple):
    """Weights `[N, K]`: `(levels * multipliers // 8 + offsets) * scales`.

    `levels` `[N, K / 32, 32]` are in 0..15, `multipliers` and `offsets` `[N, K / 32, 1]` in 1..255 and -127..127, all
    as float32; `scales` `[N]`.
    """

    levels: torch.Tensor
    multipliers: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor

    @property
    def integers(self) -> torch.Tensor:
        """The weights as integers of 8 bits, `[N, K]` float32 in -127..127."""
        return _integers(self.levels, self.multipliers, self.offsets).flatten(1)


def supports(shape: torch.Size) -> bool:
    """Whether a weight `[N, K]` of this shape consists of whole groups."""
    return shape[1] % GROUP == 0


def quantize(weight: torch.Tensor, importance: torch.Tensor | None) -> Quantized:
    """The levels of a weight `[N, K]`.

    For each group the function tries several ranges. For each range it fits multiplier and offset to the levels by
    least squares, rounds them and chooses the levels again. The range with the least sum of squared errors wins. An
    error is weighted by the `importance` `[K]` of its channel, the mean square of the channel's inputs. The weighting
    is that of llama.cpp's importance matrix; without it the KL divergence of a small model is four times as large.
    """
    scales = (weight.float().abs().amax(1) / _LARGEST).clamp_min(1e-12)
    w = (weight.float() / scales[:, None]).view(len(weight), -1, GROUP)
    cost = _cost(importance, weight.shape[1])
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    best_multiplier, best_offset = torch.ones_like(low), torch.zeros_like(low)
    for share in _SHARES:
        step = ((high - low) * (share / _MAX_LEVEL)).clamp_min(1e-6)
        multiplier, offset = _fit(w, _levels(w, step, (high + low - _MAX_LEVEL * step) / 2), cost)
        levels = _rounded_levels(w, multiplier, offset)
        error = (_integers(levels, multiplier, offset) - w).square_().mul_(cost).sum(-1, keepdim=True)
        best_multiplier = torch.where(error < least, multiplier, best_multiplier)
        best_offset = torch.where(error < least, offset, best_offset)
        least = torch.minimum(error, least)
    levels = _rounded_levels(w, best_multiplier, best_offset)
    # The kernel computes in bytes without saturation.
    highest = ((_LARGEST - best_offset) * _EIGHTH + _EIGHTH - 1).div_(best_multiplier).floor_()
    return Quantized(torch.minimum(levels, highest).clamp_min_(0), best_multiplier, best_offset, scales)


def packed(quantized: Quantized) -> torch.Tensor:
    """The bytes for the kernel, `[ceil(N / 16), K / 32, 288]` uint8: dots::Int4Group in dots.h."""
    rows, groups, _ = quantized.levels.shape
    halves = quantized.levels.to(torch.uint8).view(rows, groups, GROUP // _LINE, 2, _LINE // 2)
    lines = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    numbers = torch.cat([quantized.multipliers, quantized.offsets + 128], -1).to(torch.uint8)
    missing = -rows % _OUTPUTS
    lines, numbers = (torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in (lines, numbers))
    # [strips, outputs, groups, ...] -> [strips, groups, ...]
    lines = lines.view(-1, _OUTPUTS, *lines.shape[1:]).permute(0, 2, 3, 1, 4).flatten(2)
    numbers = numbers.view(-1, _OUTPUTS, *numbers.shape[1:]).permute(0, 2, 1, 3).flatten(2)
    return torch.cat([numbers, lines], -1).contiguous()


def _cost(importance: torch.Tensor | None, width: int) -> torch.Tensor:
    """The weight of each channel's error, `[K / GROUP, GROUP]`, with mean 1 in each group."""
    cost = torch.ones(width) if importance is None else importance + _FLOOR * importance.mean() + 1e-30
    cost = cost.view(-1, GROUP)
    return cost / cost.mean(-1, keepdim=True)


def _integers(levels: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return (levels * multiplier / _EIGHTH).floor_() + offset


def _levels(w: torch.Tensor, step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return ((w - offset) / step).round_().clamp_(0, _MAX_LEVEL)


def _rounded_levels(w: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The levels whose integers are nearest: the integers are rounded down, by 7 / 16 on average."""
    return _levels(w + (0.5 - 0.5 / _EIGHTH), multiplier / _EIGHTH, offset)


def _fit(w: torch.Tensor, levels: torch.Tensor, cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded multiplier and offset `[N, K / GROUP, 1]` for these levels with the least cost."""
    mean, mean_level = (w * cost).mean(-1, keepdim=True), (levels * cost).mean(-1, keepdim=True)
    spread = (levels - mean_level).mul_(cost)
    covariance, variance = ((spread * y).sum(-1, keepdim=True) for y in (w, levels))
    multiplier = (covariance / variance.clamp_min(1e-12) * _EIGHTH).round_().clamp_(1, 255)
    levels = _levels(w, multiplier / _EIGHTH, mean - mean_level * multiplier / _EIGHTH)
    offset = ((w - (levels * multiplier / _EIGHTH).floor_()) * cost).mean(-1, keepdim=True)
    return multiplier, offset.round_().clamp_(-_LARGEST, _LARGEST)
