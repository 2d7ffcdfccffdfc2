"""Confidence sequences: intervals that hold the true value at all times together with probability 1 - alpha.

An interval of fixed size holds with probability 1 - alpha at one time only; who looks every day finds a difference that
is not there sooner or later. Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of
Mathematical Statistics 41, 1970; Howard, Ramdas, McAuliffe, Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", Annals of Statistics 49, 2021.

What is assumed. Units are assigned to variants at random and independently. Requests of one unit may depend on each
other: the statistics are kept by clusters of units.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, lgamma, log, sqrt

from serve_app.gateway.statistics import BOUNDS, Sums, cumulated

# The number of values at which the interval of a mean is as narrow as it can be.
_NARROWEST_AT = 1000
# There is no interval yet if the values come from fewer clusters than this, because the variance between clusters is
# not known: one unit that tries again and again must not decide. Rates have an upper bound for their variance.
MIN_CLUSTERS, MIN_RATE_CLUSTERS = 20, 10


@dataclass(frozen=True, slots=True)
class Interval:
    low: float = -inf
    high: float = inf

    def less(self, other: Interval) -> Interval:
        """The interval of the difference. It holds if both intervals hold."""
        return Interval(self.low - other.high, self.high - other.low)


def mean_interval(sums: Sums, alpha: float) -> Interval:
    """The asymptotic confidence sequence of a mean.

    Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central limit theory and asymptotic confidence
    sequences", Annals of Statistics 52, 2024, theorem 2.2; rho by their appendix B.2. The standard error is that of
    clusters. Requests of units that come back make earlier and later means at least as correlated as the Brownian
    motion of the theorem, so that they leave the boundary less often (Slepian, "The one-sided barrier problem for
    Gaussian noise", Bell System Technical Journal 41, 1962). This holds if the rates at which units send requests do
    not depend on the variant, and the requests do not come from ever fewer units.
    """
    mean = sums.mean
    if mean is None or sums.effective_clusters < MIN_CLUSTERS:
        return Interval()
    width = _boundary(sums.variance_of_mean, sums.count, alpha)
    return Interval(mean - width, mean + width)


def mean_difference(sums: Sums, control: Sums, alpha: float) -> Interval:
    """The asymptotic confidence sequence of a mean less that of the control, as `mean_interval`.

    The variances of the two add up, at each time with the shares of the requests that they had until then.
    """
    mean, before = sums.mean, control.mean
    if mean is None or before is None or min(sums.effective_clusters, control.effective_clusters) < MIN_CLUSTERS:
        return Interval()
    count = 2 * sums.count * control.count / (sums.count + control.count)
    width = _boundary(sums.variance_of_mean + control.variance_of_mean, count, alpha)
    return Interval(mean - before - width, mean - before + width)


def _boundary(variance: float, count: float, alpha: float) -> float:
    """Half of the width of an asymptotic confidence sequence at `count` values, for the variance of the estimate."""
    level = -2 * log(alpha)
    scaled = count * (level + log(level + 1)) / _NARROWEST_AT
    return sqrt(variance * (scaled + 1) / scaled * log((scaled + 1) / alpha**2))


def design_effect(sums: Sums, variance: float) -> float:
    """How many times larger the variance of the mean is than that of independent values; at least 1.

    `variance` is the variance of one value.
    """
    count = sums.count
    return max(1.0, sums.variance_of_mean * count / variance) if count and variance > 0 else 1.0


def rate_interval(sums: Sums, alpha: float) -> Interval:
    """The confidence sequence of the rate of an event.

    The beta-binomial mixture of `beta_binomial_interval` on effective counts: count and sum divided by the design
    effect (Rao, Scott, "A simple method for the analysis of clustered binary data", Biometrics 48, 1992). Exact for
    independent requests, an approximation for requests of units that come back.
    """
    mean = sums.mean
    if mean is None or sums.effective_clusters < MIN_RATE_CLUSTERS:
        return Interval()
    effect = design_effect(sums, mean * (1 - mean))
    return beta_binomial_interval(sum(sums.totals) / effect, sums.count / effect, alpha)


def quantile_interval(bins: Sequence[int], p: float, effect: float, alpha: float) -> Interval:
    """The confidence sequence of a quantile, between bounds of the bins.

    A bound is too low as long as the rate of values up to it is below p, and too high once it is above, by the
    confidence sequence of that rate (Howard, Ramdas, "Sequential estimation of quantiles", Bernoulli 28, 2022, derive
    sequences in this way). `effect` is the design effect by which the counts are divided.
    """
    counts = cumulated(bins)
    count, limit = counts[-1] / effect, -log(alpha)
    if not count:
        return Interval(0.0, inf)

    def side(below: int) -> int:
        """-1 for a bound that is too low, 1 for one that is too high, 0 for one that the quantile can be at."""
        if _log_mixture(below / effect, count, p) <= limit:
            return 0
        return -1 if below / effect < p * count else 1

    known = counts[: len(BOUNDS)]
    first, after = bisect_left(known, 0, key=side), bisect_left(known, 1, key=side)
    return Interval(BOUNDS[first - 1] if first else 0.0, BOUNDS[after] if after < len(BOUNDS) else inf)


def quantile(bins: Sequence[int], p: float) -> float | None:
    """The upper bound of the bin that holds the quantile; None without a value."""
    counts = cumulated(bins)
    if not counts[-1]:
        return None
    return next((bound for bound, below in zip(BOUNDS, counts, strict=False) if below >= p * counts[-1]), BOUNDS[-1])


def beta_binomial_interval(successes: float, count: float, alpha: float) -> Interval:
    """The confidence sequence of a rate of independent events, exact at every count.

    The rates at which the mixture of likelihood ratios with a uniform prior is at most 1 / alpha. By Ville's inequality
    it exceeds that at the true rate with probability alpha at any time. Robbins 1970; Howard et al. 2021, section 3.2.
    """
    if count <= 0:
        return Interval(0.0, 1.0)
    limit, center = -log(alpha), successes / count

    def outside(rate: float) -> bool:
        return _log_mixture(successes, count, rate) > limit

    return Interval(_edge(outside, 0.0, center), _edge(outside, 1.0, center))


def _log_mixture(successes: float, count: float, rate: float) -> float:
    """The logarithm of the mean likelihood over all rates, less that at `rate`."""
    failures = count - successes
    mean = lgamma(successes + 1) + lgamma(failures + 1) - lgamma(count + 2)
    at_rate = (successes * log(rate) if successes else 0.0) + (failures * log(1 - rate) if failures > 1e-9 else 0.0)
    return mean - at_rate


def _edge(outside: Callable[[float], bool], end: float, inside: float) -> float:
    """The edge of an interval between `end` and a point inside, by bisection."""
    if abs(end - inside) < 1e-12:
        return end
    for _ in range(40):
        middle = (end + inside) / 2
        if outside(middle):
            end = middle
        else:
            inside = middle
    return end
