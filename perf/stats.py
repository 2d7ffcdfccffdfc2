"""Whether the latencies of two runs differ, by how much, and how sure that is.

A shift is the median of the ratios of all pairs of requests, one of each run (Hodges and Lehmann 1963, on logarithms):
the estimate that belongs to the Mann-Whitney test. Of log-normal latencies it needs two thirds of the requests that the
ratio of two medians needs for the same certainty, and two humps (requests that waited for a step, and those that did
not) do not make it jump.

Requests are not independent of each other: those of one repeat had the same machine, and neighbours had the same queue.
So what is resampled, and counted as an observation, is a cluster of them: a repeat, or where there is only one, a
twentieth of it in the order of time. What a machine does between repeats is then part of the uncertainty.
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
LEAST_MS = 1e-4  # what results.json rounds to; a logarithm wants more than 0
MOST_PAIRED = 2000  # of a larger sample, as many quantiles tell the median of all pairs


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Logarithms of latencies, cluster by cluster."""

    clusters: tuple[Floats, ...]
    repeats: int

    @classmethod
    def of(cls, ms: Sequence[float | None], repeats: Sequence[int]) -> Sample:
        """Of requests in the order in which they were due; those without the quantity are left out."""
        there = [(value, repeat) for value, repeat in zip(ms, repeats, strict=True) if value is not None]
        logs = np.log(np.maximum([value for value, _ in there], LEAST_MS))
        labels = np.array([repeat for _, repeat in there])
        found = np.unique(labels)
        if len(found) > 1:
            return cls(tuple(logs[labels == label] for label in found), len(found))
        return cls(tuple(np.array_split(logs, min(BLOCKS, max(1, len(logs))))), len(found))

    @property
    def values(self) -> Floats:
        return np.concatenate(self.clusters)

    @property
    def sizes(self) -> Floats:
        return np.array([len(cluster) for cluster in self.clusters], dtype=float)


@dataclass(frozen=True, slots=True)
class Difference:
    """Relative: 0.1 is a tenth more than the baseline's. `p` is of one test, not corrected for others."""

    shift: float
    low: float
    high: float
    p: float


def latency_difference(baseline: Sample, candidate: Sample, confidence: float, seed: int) -> Difference:
    pairs = _pairs(baseline, candidate)
    centre = float(np.median(pairs))
    resampled = _resampled_shifts(baseline, candidate, pairs, centre, np.random.default_rng(seed))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    freedom = _freedom(_counted(baseline, candidate))
    # Few clusters are too alike in resamples, and t is not normal for them: Hesterberg 2015, "What teachers should know
    # about the bootstrap", section 5.3, here as a factor, because few clusters have no extreme quantiles.
    wider = stats.t.ppf(tails[1], freedom) / stats.norm.ppf(tails[1]) * math.sqrt((freedom + 2) / freedom)
    low, high = centre + (np.quantile(resampled, tails) - centre) * wider
    return Difference(math.expm1(centre), math.expm1(low), math.expm1(high), mann_whitney(baseline, candidate))


def mann_whitney(baseline: Sample, candidate: Sample) -> float:
    """Two-sided. The statistic's variance is multiplied by the design effect (Kish 1965): how much more the ranks of
    clusters vary than those of independent requests would. Where they vary less, chance did it, and nothing is gained.
    """
    ours, theirs = baseline.values, candidate.values
    ranks = stats.rankdata(np.concatenate([ours, theirs]))
    if np.ptp(ranks) == 0:
        return 1.0
    counted = _counted(baseline, candidate)
    effect = _between(counted, (ranks[: len(ours)], ranks[len(ours) :]), (baseline, candidate)) / ranks.var(ddof=1)
    z = stats.norm.isf(stats.mannwhitneyu(ours, theirs).pvalue / 2)
    return float(2 * stats.t.sf(z / math.sqrt(max(1.0, effect)), _freedom(counted)))


def rate_difference(baseline: Sequence[float], candidate: Sequence[float], confidence: float) -> Difference:
    """Of one number a repeat: Welch's t test on logarithms, since ranks of so few could not tell anything."""
    ours, theirs = np.log(baseline), np.log(candidate)
    shift = float(theirs.mean() - ours.mean())
    if max(np.ptp(ours), np.ptp(theirs)) < 1e-12:  # a server that is exact, as a mock is
        same = abs(shift) < 1e-12
        return Difference(math.expm1(shift), math.expm1(shift), math.expm1(shift), 1.0 if same else 0.0)
    test = stats.ttest_ind(theirs, ours, equal_var=False)
    low, high = test.confidence_interval(confidence)
    return Difference(math.expm1(shift), math.expm1(low), math.expm1(high), float(test.pvalue))


def failures_p(baseline: tuple[int, int], candidate: tuple[int, int]) -> float:
    """Fisher's exact test of (failed, requests)."""
    return float(stats.fisher_exact([[failed, total - failed] for failed, total in (baseline, candidate)]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that all tests together have one chance of alpha of a false alarm (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def _counted(*sides: Sample) -> tuple[Sample, ...]:
    """The sides that know how much clusters vary; against a side with repeats, blocks within one repeat do not."""
    return tuple(side for side in sides if side.repeats > 1) or sides


def _freedom(sides: Sequence[Sample]) -> int:
    return sum(len(side.clusters) - 1 for side in sides)


def _between(counted: Sequence[Sample], ranks: Sequence[Floats], sides: Sequence[Sample]) -> float:
    """Mean square of ranks between clusters of the same side."""
    squares = 0.0
    for side, own in zip(sides, ranks, strict=True):
        if side in counted:
            parts = np.split(own, np.cumsum(side.sizes[:-1]).astype(int))
            squares += sum(len(part) * float(part.mean() - own.mean()) ** 2 for part in parts)
    return squares / _freedom(counted)


def _pairs(baseline: Sample, candidate: Sample) -> Floats:
    """Differences of logarithms of all pairs."""
    levels = (np.arange(MOST_PAIRED) + 0.5) / MOST_PAIRED
    ours, theirs = (
        side.values if len(side.values) <= MOST_PAIRED else np.quantile(side.values, levels)
        for side in (baseline, candidate)
    )
    return np.subtract.outer(theirs, ours).ravel()


def _resampled_shifts(
    baseline: Sample, candidate: Sample, pairs: Floats, centre: float, rng: np.random.Generator
) -> Floats:
    """The shift of each of RESAMPLES draws of whole clusters with replacement. What is inside of a cluster stays as it
    is: drawing there as well would count the spread of requests twice (Davison and Hinkley 1997, section 3.8).

    A draw only says how often each cluster counts, so its shift is where a weighted sum over pairs of clusters passes
    one half, whatever the number of requests. The sum is taken at a few shifts that all draws share; it is smooth.
    """
    weights = [_draws(len(side.clusters), rng) for side in (baseline, candidate)]
    wholes = [weight @ side.sizes for weight, side in zip(weights, (baseline, candidate), strict=True)]

    def share_below(shifts: Floats) -> Floats:
        counts = _counts_below(baseline, candidate, shifts)
        below = [((weights[0] @ at_shift) * weights[1]).sum(axis=1) for at_shift in counts]
        return np.stack(below, axis=1) / (wholes[0] * wholes[1])[:, np.newaxis]

    reach = 1.2 * float(np.abs(share_below(np.array([centre])) - 0.5).max())
    grid = np.quantile(pairs, np.clip(np.linspace(0.5 - reach, 0.5 + reach, GRID), 0, 1))
    return _passes_half(grid, share_below(grid))


def _draws(clusters: int, rng: np.random.Generator) -> Floats:
    """How often each cluster was drawn, one row a resample."""
    drawn = rng.integers(clusters, size=(RESAMPLES, clusters)) + np.arange(RESAMPLES)[:, np.newaxis] * clusters
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * clusters).reshape(RESAMPLES, clusters).astype(float)


def _counts_below(baseline: Sample, candidate: Sample, shifts: Floats) -> Floats:
    """[shift, cluster of the baseline, cluster of the candidate]: pairs that differ by less; equal ones count half."""
    edges = baseline.values + shifts[:, np.newaxis]
    starts = np.concatenate([[0], np.cumsum(baseline.sizes[:-1])]).astype(int)
    columns = []
    for cluster in candidate.clusters:
        ordered = np.sort(cluster)
        below = (np.searchsorted(ordered, edges, "left") + np.searchsorted(ordered, edges, "right")) / 2
        columns.append(np.add.reduceat(below, starts, axis=1))
    return np.stack(columns, axis=2)


def _passes_half(grid: Floats, shares: Floats) -> Floats:
    """For each row, whose values rise along the grid."""
    after = np.clip((shares < 0.5).sum(axis=1), 1, len(grid) - 1)
    rows = np.arange(len(shares))
    before_share, after_share = shares[rows, after - 1], shares[rows, after]
    rise = np.where(after_share > before_share, after_share - before_share, 1.0)
    part = np.clip((0.5 - before_share) / rise, 0, 1)
    passes: Floats = grid[after - 1] + part * (grid[after] - grid[after - 1])
    return passes
