"""Sufficient statistics of an experiment's variants: sums by cluster of units, which add up over ingresses."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from serve_app.core.experiments import CLUSTERS

# The metrics of a variant: times in seconds, lengths in tokens, shares and scores from 0 to 1.
METRICS = ("error_rate", "ttft", "tpot", "length", "feedback")
# The upper bounds of the bins of the time to the first token, in seconds: 1 ms to 10 minutes, each 10 % higher.
BOUNDS = tuple(0.001 * 1.1**number for number in range(140))


def _floats() -> array[float]:
    return array("d", bytes(8 * CLUSTERS))


@dataclass(slots=True)
class Sums:
    """The count and the sum of a metric in each cluster.

    A cluster holds all requests of its units. Requests of one unit are alike, so that they tell less than as many
    requests of different units. The variance between the sums of clusters includes that; a variance of requests would
    not. Clusters of units that are assigned at random are independent of each other.
    """

    counts: array[float] = field(default_factory=_floats)
    totals: array[float] = field(default_factory=_floats)

    def add(self, cluster: int, value: float, count: int = 1) -> None:
        """Add the sum of `count` values."""
        self.counts[cluster] += count
        self.totals[cluster] += value

    def merge(self, other: Sums) -> None:
        for cluster in range(CLUSTERS):
            self.counts[cluster] += other.counts[cluster]
            self.totals[cluster] += other.totals[cluster]

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """The mean of all values; None without a value."""
        count = self.count
        return sum(self.totals) / count if count else None

    @property
    def effective_clusters(self) -> float:
        """The number of clusters of equal size that would tell as much (Kish, "Survey Sampling", 1965)."""
        squares = sum([count * count for count in self.counts])
        return self.count**2 / squares if squares else 0.0

    @property
    def variance_of_mean(self) -> float:
        """The cluster-robust variance of the mean, a ratio of two sums over clusters.

        Cochran, "Sampling Techniques", 3rd edition, 1977, equation 6.13 with the factor B / (B - 1).
        """
        mean, count = self.mean, self.count
        occupied = CLUSTERS - self.counts.count(0.0)
        if mean is None or occupied < 2:
            return 0.0
        pairs = zip(self.totals, self.counts, strict=True)
        squares = sum([(total - mean * size) ** 2 for total, size in pairs])
        return squares * occupied / (occupied - 1) / count**2


@dataclass(slots=True)
class VariantStatistics:
    """What is known of one variant: its metrics, the distribution of the time to the first token, and the outcomes."""

    sums: dict[str, Sums] = field(default_factory=lambda: {metric: Sums() for metric in METRICS})
    ttft_bins: array[int] = field(default_factory=lambda: array("q", bytes(8 * (len(BOUNDS) + 1))))
    outcomes: dict[str, int] = field(default_factory=dict)

    def ended(self, cluster: int, outcome: str, failed: bool) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.sums["error_rate"].add(cluster, float(failed))

    def first_token(self, cluster: int, seconds: float) -> None:
        self.sums["ttft"].add(cluster, seconds)
        self.ttft_bins[bisect_left(BOUNDS, seconds)] += 1

    def merge(self, other: VariantStatistics) -> None:
        for metric, sums in other.sums.items():
            self.sums[metric].merge(sums)
        for number, count in enumerate(other.ttft_bins):
            self.ttft_bins[number] += count
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count


@dataclass(slots=True)
class ExperimentStatistics:
    """The statistics of an experiment in one ingress, since `began` (seconds since 1970)."""

    began: float
    variants: dict[str, VariantStatistics] = field(default_factory=dict)

    def of(self, variant: str) -> VariantStatistics:
        if variant not in self.variants:
            self.variants[variant] = VariantStatistics()
        return self.variants[variant]


def merged(parts: Iterable[ExperimentStatistics]) -> ExperimentStatistics:
    """The statistics of an experiment over all ingresses."""
    whole = ExperimentStatistics(0.0)
    for part in parts:
        whole.began = min(whole.began or part.began, part.began)
        for name, variant in part.variants.items():
            whole.of(name).merge(variant)
    return whole


def cumulated(bins: Sequence[int]) -> list[int]:
    """The number of values up to each of BOUNDS; the last number is that of all values."""
    return list(accumulate(bins))
