"""Confidence sequences hold at all times: simulated experiments that are looked at every day."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import inf

import numpy as np
import pytest

from serve_app.core.experiments import CLUSTERS
from serve_app.gateway.confidence import (
    MIN_CLUSTERS,
    Interval,
    beta_binomial_interval,
    design_effect,
    mean_interval,
    quantile,
    quantile_interval,
    rate_interval,
)
from serve_app.gateway.experiment_report import ALPHA, difference
from serve_app.gateway.statistics import BOUNDS, Sums, VariantStatistics

EXPERIMENTS, DAYS, USERS = 1000, 10, 300


@dataclass
class Day:
    """The requests of one day in all experiments: of one variant, summed by experiment and cluster."""

    counts: np.ndarray
    seconds: np.ndarray
    errors: np.ndarray
    bins: np.ndarray
    sums: tuple[np.ndarray, ...]


def simulated(share: float, effect: float = 1.0, experiments: int = EXPERIMENTS) -> list[tuple[Day, Day]]:
    """The days of experiments with `share` of the users in the variant. Its times are `effect` times those of control.

    Users differ: in how often they come (exponential), in their times (log-normal) and in their error rates (beta,
    3 % on average). A quarter of them is new on each of the first four days.
    """
    random = np.random.default_rng(20260930)
    shape = (experiments, USERS)
    arm = random.random(shape) < share
    cluster = random.integers(0, CLUSTERS, shape)
    usual = np.exp(random.normal(0, 0.5, shape)) * np.where(arm, effect, 1.0)
    error_rate, visits = random.beta(0.09, 2.91, shape), random.exponential(1.5, shape)
    first_day = random.integers(0, 4, shape)
    days = []
    for day in range(DAYS):
        counts = random.poisson(visits * (first_day <= day))
        who = np.repeat(np.arange(counts.size), counts.ravel())
        seconds = usual.ravel()[who] * np.exp(random.normal(0, 1, who.size)) * 0.3
        errors = random.random(who.size) < error_rate.ravel()[who]
        parts = [
            summed(who // USERS, cluster.ravel()[who], seconds, errors, arm.ravel()[who] == side, experiments)
            for side in (False, True)
        ]
        days.append((parts[0], parts[1]))
    return days


def summed(
    experiment: np.ndarray, cluster: np.ndarray, seconds: np.ndarray, errors: np.ndarray, chosen: np.ndarray, size: int
) -> Day:
    experiment, cluster, seconds, errors = experiment[chosen], cluster[chosen], seconds[chosen], errors[chosen]
    cell, width = experiment * CLUSTERS + cluster, len(BOUNDS) + 1

    def by_cell(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cell, weights, size * CLUSTERS).reshape(size, CLUSTERS).astype(float)

    bins = np.bincount(experiment * width + np.searchsorted(BOUNDS, seconds), minlength=size * width)
    naive = [np.bincount(experiment, weights, size) for weights in (None, seconds, seconds**2)]
    return Day(by_cell(), by_cell(seconds), by_cell(errors), bins.reshape(size, width), tuple(naive))


def statistics(day: Day, number: int) -> VariantStatistics:
    found = VariantStatistics()
    for metric, totals in (("ttft", day.seconds), ("error_rate", day.errors)):
        found.sums[metric] = Sums(array("d", day.counts[number].tobytes()), array("d", totals[number].tobytes()))
    found.ttft_bins = array("q", day.bins[number].tobytes())
    return found


def added(days: list[tuple[Day, Day]]) -> list[tuple[Day, Day]]:
    """The sums up to each day."""
    for (control, variant), (before, earlier) in zip(days[1:], days, strict=False):
        for one, last in ((control, before), (variant, earlier)):
            one.counts += last.counts
            one.seconds += last.seconds
            one.errors += last.errors
            one.bins += last.bins
            one.sums = tuple(a + b for a, b in zip(one.sums, last.sums, strict=True))
    return days


def called_different(days: list[tuple[Day, Day]], metric: str, experiments: int) -> float:
    """The share of experiments in which a metric is called different on any day, with 95 % confidence."""
    found = 0
    for number in range(experiments):
        for control, variant in days:
            interval = difference(statistics(variant, number), statistics(control, number), metric, ALPHA)[2]
            if interval.low > 0 or interval.high < 0:
                found += 1
                break
    return found / experiments


@pytest.fixture(scope="module")
def days() -> list[tuple[Day, Day]]:
    """A/A experiments with 10 % of the users in the variant."""
    return added(simulated(share=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["ttft", "error_rate", "ttft_p95"])
def test_at_most_5_percent_of_a_a_experiments_are_called_different_on_any_day(
    days: list[tuple[Day, Day]], metric: str
) -> None:
    assert called_different(days, metric, EXPERIMENTS) <= 0.05


@pytest.mark.slow
def test_an_interval_for_one_look_by_request_would_call_most_of_them_different(days: list[tuple[Day, Day]]) -> None:
    """The same data with the usual test, which takes requests as independent and looks once."""
    different = np.zeros(EXPERIMENTS, bool)
    for control, variant in days:
        means, variances = [], []
        for n, total, squares in (control.sums, variant.sums):
            n = np.maximum(n, 2)
            means.append(total / n)
            variances.append((squares / n - (total / n) ** 2) / n)
        different |= np.abs(means[1] - means[0]) > 1.96 * np.sqrt(variances[0] + variances[1])
    assert different.mean() > 0.4


@pytest.mark.slow
def test_a_difference_is_found() -> None:
    worse = added(simulated(share=0.5, effect=1.6, experiments=50))
    assert called_different(worse, "ttft", 50) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_the_interval_of_a_rate_holds_at_all_counts(rate: float) -> None:
    """Looked at after every event up to 1,000, for independent events: exact at every count, also the first ones."""
    random, misses = np.random.default_rng(7), 0
    for _ in range(200):
        successes = np.cumsum(random.random(1000) < rate)
        counts = (*range(1, 50), *range(50, 1001, 25))
        looks = (beta_binomial_interval(float(successes[n - 1]), n, 0.05) for n in counts)
        misses += any(not one.low <= rate <= one.high for one in looks)
    assert misses / 200 <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.95])
def test_the_interval_of_a_quantile_holds_at_all_counts(p: float) -> None:
    random, misses = np.random.default_rng(8), 0
    true = float(np.exp(np.sqrt(2) * _inverse_error_function(2 * p - 1)) * 0.1)
    for _ in range(200):
        seconds = np.exp(random.normal(0, 1, 2000)) * 0.1
        places = np.searchsorted(BOUNDS, seconds)
        for count in range(50, 2001, 50):
            bins = np.bincount(places[:count], minlength=len(BOUNDS) + 1)
            interval = quantile_interval(bins.tolist(), p, 1.0, 0.05)
            if not interval.low <= true <= interval.high:
                misses += 1
                break
    assert misses / 200 <= 0.05
    assert interval.high < 1.5 * true
    assert interval.low > true / 1.5
    assert true / 1.2 < (quantile(bins.tolist(), p) or 0) < true * 1.2


def _inverse_error_function(value: float) -> float:
    from scipy.special import erfinv

    return float(erfinv(value))


def test_known_values_of_the_beta_binomial_interval() -> None:
    """With 0 of n events the mixture is 1 / ((n + 1) (1 - p)^n), so that the upper end is known."""
    interval = beta_binomial_interval(0, 20, 0.05)
    assert interval.low == 0
    assert interval.high == pytest.approx(1 - (0.05 / 21) ** (1 / 20), rel=1e-6)
    mirrored = beta_binomial_interval(20, 20, 0.05)
    assert mirrored.low == pytest.approx(1 - interval.high, rel=1e-6)
    assert mirrored.high == 1
    assert beta_binomial_interval(0, 0, 0.05) == Interval(0, 1)


def of_clusters(*pairs: tuple[float, float]) -> Sums:
    sums = Sums()
    for cluster, (count, total) in enumerate(pairs):
        sums.counts[cluster], sums.totals[cluster] = count, total
    return sums


def test_the_variance_of_a_mean_is_that_of_clusters() -> None:
    """Ten equal values of one unit tell as much as one value: the variance is that of the means of the units."""
    values = [1.0, 2.0, 4.0, 5.0]
    once = of_clusters(*((1, value) for value in values))
    often = of_clusters(*((10, 10 * value) for value in values))
    assert once.mean == often.mean == 3
    assert once.variance_of_mean == pytest.approx(often.variance_of_mean) == pytest.approx(np.var(values, ddof=1) / 4)
    assert often.effective_clusters == pytest.approx(4)
    assert design_effect(often, float(np.var(values, ddof=1))) == pytest.approx(10)
    assert of_clusters((5, 5)).variance_of_mean == 0
    assert Sums().mean is None


def test_a_mean_has_no_interval_before_enough_clusters_have_values() -> None:
    few = of_clusters(*((1, float(n)) for n in range(MIN_CLUSTERS - 1)))
    assert mean_interval(few, 0.05) == Interval(-inf, inf)
    enough = of_clusters(*((1, float(n)) for n in range(MIN_CLUSTERS)))
    interval = mean_interval(enough, 0.05)
    assert -inf < interval.low < 9.5 < interval.high < inf
    one_heavy = of_clusters(*((1, float(n)) for n in range(60)), (1000, 1000.0))
    assert mean_interval(one_heavy, 0.05) == Interval(-inf, inf), "one unit sends most requests"


def test_a_rate_without_events_has_an_interval() -> None:
    sums = of_clusters(*((10, 0.0) for _ in range(30)))
    interval = rate_interval(sums, 0.05)
    assert interval.low == 0
    assert interval.high == pytest.approx(1 - (0.05 / 301) ** (1 / 300))
    assert rate_interval(Sums(), 0.05) == Interval()


def test_scores_between_0_and_1_have_an_interval_as_rates_have() -> None:
    sums = of_clusters(*((10, 5.0) for _ in range(30)))
    interval = rate_interval(sums, 0.05)
    assert 0.3 < interval.low < 0.5 < interval.high < 0.7


def test_the_difference_of_intervals() -> None:
    assert Interval(1, 2).less(Interval(0.5, 3)) == Interval(-2, 1.5)
