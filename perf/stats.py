"""Statistical comparison of the latencies of two runs: the shift, its confidence interval and a p-value.

The shift is the median ratio of all pairs of requests, one of each run (Hodges and Lehmann 1963, on logarithms): the
estimator that belongs to the Mann-Whitney test. For log-normal latencies it needs two thirds of the requests that the
ratio of two medians needs for the same precision, and it does not jump if the distribution has two modes (requests
that waited for a step and requests that did not).

Requests are not independent: those of a repeat share the state of the machine, and neighbours share a queue. So the
unit of resampling and of the degrees of freedom is a cluster of requests: a repeat or, in a run with one repeat, a
twentieth of it in order of time. The interval then includes the drift of the machine between repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats: TypeAlias = NDArray[np.float64]

BLOCKS = 20
RESAMPLES = 2000
GRID = 11
MIN_MS = 1e-4  # the resolution of results.json; logarithms need values above 0
MAX_PAIRED = 2000  # a larger sample is reduced to this many quantiles for the median of all pairs


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Logarithms of latencies in ms, by cluster."""

    clusters: tuple[Floats, ...]
    repeats: int

    @classmethod
    def of(cls, ms: Sequence[float | None], repeats: Sequence[int]) -> Sample:
        """`ms`: latencies in the order of the due times; None values are left out. `repeats`: the repeat of each."""
        present = [(value, repeat) for value, repeat in zip(ms, repeats, strict=True) if value is not None]
        logs = np.log(np.maximum([value for value, _ in present], MIN_MS))
        labels = np.array([repeat for _, repeat in present])
        unique = np.unique(labels)
        if len(unique) > 1:
            return cls(tuple(logs[labels == label] for label in unique), len(unique))
        return cls(tuple(np.array_split(logs, min(BLOCKS, max(1, len(logs))))), len(unique))

    @property
    def values(self) -> Floats:
        return np.concatenate(self.clusters)

    @property
    def sizes(self) -> Floats:
        return np.array([len(cluster) for cluster in self.clusters], dtype=float)


@dataclass(frozen=True, slots=True)
class Difference:
    """Relative change: 0.1 is 10 % more than the baseline. `p` is not adjusted for other tests."""

    shift: float
    low: float
    high: float
    p: float


def latency_difference(
    baseline: Sample, candidate: Sample, confidence: float, seed: int, resamples: int = RESAMPLES
) -> Difference:
    pairs = _pairs(baseline, candidate)
    centre = float(np.median(pairs))
    resampled = _resampled_shifts(baseline, candidate, pairs, centre, np.random.default_rng(seed), resamples)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    freedom = _degrees_of_freedom(_informative(baseline, candidate))
    # With few clusters the bootstrap interval is too narrow (Hesterberg 2015, "What teachers should know about the
    # bootstrap", section 5.3). The correction is a factor, because few clusters have no extreme quantiles.
    wider = stats.t.ppf(tails[1], freedom) / stats.norm.ppf(tails[1]) * math.sqrt((freedom + 2) / freedom)
    low, high = centre + (np.quantile(resampled, tails) - centre) * wider
    return Difference(math.expm1(centre), math.expm1(low), math.expm1(high), mann_whitney(baseline, candidate))


def mann_whitney(baseline: Sample, candidate: Sample) -> float:
    """Two-sided p-value. The variance is multiplied by the design effect (Kish 1965): how much more the ranks of
    clusters vary than those of independent requests would. A design effect below 1 is chance and counts as 1.
    """
    before, after = baseline.values, candidate.values
    ranks = stats.rankdata(np.concatenate([before, after]))
    if np.ptp(ranks) == 0:
        return 1.0
    informative = _informative(baseline, candidate)
    between = _between_clusters(informative, (ranks[: len(before)], ranks[len(before) :]), (baseline, candidate))
    design_effect = between / ranks.var(ddof=1)
    z = stats.norm.isf(stats.mannwhitneyu(before, after).pvalue / 2)
    return float(2 * stats.t.sf(z / math.sqrt(max(1.0, design_effect)), _degrees_of_freedom(informative)))


def rate_difference(baseline: Sequence[float], candidate: Sequence[float], confidence: float) -> Difference:
    """One value per repeat: Welch's t-test on logarithms, since ranks of so few values have no power."""
    before, after = np.log(baseline), np.log(candidate)
    shift = float(after.mean() - before.mean())
    if max(np.ptp(before), np.ptp(after)) < 1e-12:  # a server without variance, such as a mock
        same = abs(shift) < 1e-12
        return Difference(math.expm1(shift), math.expm1(shift), math.expm1(shift), 1.0 if same else 0.0)
    test = stats.ttest_ind(after, before, equal_var=False)
    low, high = test.confidence_interval(confidence)
    return Difference(math.expm1(shift), math.expm1(low), math.expm1(high), float(test.pvalue))


def failures_p(baseline: tuple[int, int], candidate: tuple[int, int]) -> float:
    """p-value of Fisher's exact test on (failed, requests)."""
    return float(stats.fisher_exact([[failed, total - failed] for failed, total in (baseline, candidate)]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values so that all tests together have the false alarm probability of one (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def _informative(*sides: Sample) -> tuple[Sample, ...]:
    """The sides whose clusters show the drift between repeats: those with several repeats, if there are any."""
    return tuple(side for side in sides if side.repeats > 1) or sides


def _degrees_of_freedom(sides: Sequence[Sample]) -> int:
    return sum(len(side.clusters) - 1 for side in sides)


def _between_clusters(informative: Sequence[Sample], ranks: Sequence[Floats], sides: Sequence[Sample]) -> float:
    """Mean square of ranks between the clusters of a side."""
    squares = 0.0
    for side, side_ranks in zip(sides, ranks, strict=True):
        if side in informative:
            parts = np.split(side_ranks, np.cumsum(side.sizes[:-1]).astype(int))
            squares += sum(len(part) * float(part.mean() - side_ranks.mean()) ** 2 for part in parts)
    return squares / _degrees_of_freedom(informative)


def _pairs(baseline: Sample, candidate: Sample) -> Floats:
    """Differences of the logarithms of all pairs of requests."""
    levels = (np.arange(MAX_PAIRED) + 0.5) / MAX_PAIRED
    before, after = (
        side.values if len(side.values) <= MAX_PAIRED else np.quantile(side.values, levels)
        for side in (baseline, candidate)
    )
    return np.subtract.outer(after, before).ravel()


def _resampled_shifts(
    baseline: Sample, candidate: Sample, pairs: Floats, centre: float, rng: np.random.Generator, resamples: int
) -> Floats:
    """The shifts of `resamples` bootstrap draws of whole clusters with replacement.

    Requests within a cluster are not resampled: this would count their spread twice (Davison and Hinkley 1997,
    section 3.8). A draw only sets how often each cluster counts, so its shift is where a weighted sum over pairs of
    clusters passes one half, for any number of requests. All draws share a grid of shifts and interpolate between
    them, since the sum is smooth.
    """
    weights = [_draws(len(side.clusters), resamples, rng) for side in (baseline, candidate)]
    totals = [weight @ side.sizes for weight, side in zip(weights, (baseline, candidate), strict=True)]

    def share_below(shifts: Floats) -> Floats:
        counts = _counts_below(baseline, candidate, shifts)
        below = [((weights[0] @ at_shift) * weights[1]).sum(axis=1) for at_shift in counts]
        return np.stack(below, axis=1) / (totals[0] * totals[1])[:, np.newaxis]

    reach = 1.2 * float(np.abs(share_below(np.array([centre])) - 0.5).max())
    grid = np.quantile(pairs, np.clip(np.linspace(0.5 - reach, 0.5 + reach, GRID), 0, 1))
    return _crossings(grid, share_below(grid))


def _draws(clusters: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[resample, cluster]: how often each cluster was drawn."""
    drawn = rng.integers(clusters, size=(resamples, clusters)) + np.arange(resamples)[:, np.newaxis] * clusters
    return np.bincount(drawn.ravel(), minlength=resamples * clusters).reshape(resamples, clusters).astype(float)


def _counts_below(baseline: Sample, candidate: Sample, shifts: Floats) -> list[Floats]:
    """For each shift [baseline cluster, candidate cluster]: the pairs that differ by less; ties count half."""
    order = np.argsort(candidate.values)
    ordered = candidate.values[order]
    labels = np.repeat(np.arange(len(candidate.clusters)), candidate.sizes.astype(int))[order]
    # [n, cluster]: how many of the n smallest values of the candidate belong to the cluster
    members = np.zeros((len(ordered) + 1, len(candidate.clusters)))
    members[np.arange(1, len(ordered) + 1), labels] = 1
    smallest = members.cumsum(axis=0)
    starts = np.concatenate([[0], np.cumsum(baseline.sizes[:-1])]).astype(int)
    counts = []
    for shift in shifts:
        edges = baseline.values + shift
        below = smallest[np.searchsorted(ordered, edges, "left")] + smallest[np.searchsorted(ordered, edges, "right")]
        counts.append(np.add.reduceat(below, starts, axis=0) / 2)
    return counts


def _crossings(grid: Floats, shares: Floats) -> Floats:
    """For each row of shares, which rise along the grid: where they pass one half."""
    after = np.clip((shares < 0.5).sum(axis=1), 1, len(grid) - 1)
    rows = np.arange(len(shares))
    before_share, after_share = shares[rows, after - 1], shares[rows, after]
    rise = np.where(after_share > before_share, after_share - before_share, 1.0)
    part = np.clip((0.5 - before_share) / rise, 0, 1)
    crossings: Floats = grid[after - 1] + part * (grid[after] - grid[after - 1])
    return crossings
