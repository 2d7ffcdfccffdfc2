"""False alarm rate, power and coverage of the statistics, with fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from perf.stats import Difference, Floats, Sample, holm, latency_difference, mann_whitney, rate_difference

pytestmark = pytest.mark.slow

SIGMA = 0.2
Draw = Callable[[np.random.Generator], Floats]


def sample(ms: Floats, repeats: int = 1) -> Sample:
    return Sample.of(list(ms), list(np.arange(len(ms)) * repeats // len(ms)))


def latencies(count: int = 200, times: float = 1.0) -> Draw:
    return lambda rng: times * rng.lognormal(math.log(50), SIGMA, count)


def drifting(repeats: int, each: int, drift: float) -> Draw:
    """The speed of the machine differs between repeats."""
    return lambda rng: np.concatenate(
        [rng.lognormal(math.log(50) + rng.normal(0, drift), SIGMA, each) for _ in range(repeats)]
    )


def differences(baseline: Draw, candidate: Draw, runs: int, repeats: int = 1) -> list[Difference]:
    """500 resamples instead of 2,000, since there are hundreds of comparisons."""
    rng = np.random.default_rng(7)
    return [
        latency_difference(sample(baseline(rng), repeats), sample(candidate(rng), repeats), 0.95, number, resamples=500)
        for number in range(runs)
    ]


def different(result: Difference) -> bool:
    return result.p < 0.05 and not result.low <= 0 <= result.high


def covered(result: list[Difference], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in result]))


def test_95_percent_interval_covers_the_truth_in_95_percent() -> None:
    result = differences(latencies(), latencies(), 600)

    assert 0.93 <= covered(result, 0.0) <= 0.97


def test_factor_on_all_latencies_multiplies_shift_and_interval() -> None:
    """So the coverage of the interval is the same for every true shift."""
    (same,), (slower,) = (differences(latencies(), latencies(times=times), 1) for times in (1.0, 1.1))

    assert [1 + slower.shift, 1 + slower.low, 1 + slower.high] == pytest.approx(
        [1.1 * (1 + same.shift), 1.1 * (1 + same.low), 1.1 * (1 + same.high)]
    )


def test_interval_covers_the_truth_if_the_machine_drifts() -> None:
    result = differences(drifting(5, 40, 0.05), drifting(5, 40, 0.05), 400, repeats=5)

    assert 0.93 <= covered(result, 0.0) <= 0.98


def test_increase_of_10_percent_is_detected() -> None:
    result = differences(latencies(), latencies(times=1.1), 300)

    assert np.mean([different(one) and one.shift >= 0.05 for one in result]) >= 0.95


@pytest.mark.parametrize("repeats", [3, 5])
def test_drift_between_repeats_is_not_a_difference(repeats: int) -> None:
    result = differences(drifting(repeats, 60, 0.1), drifting(repeats, 60, 0.1), 300, repeats=repeats)

    # The nominal rate is 0.05; the bound adds three standard errors of 300 comparisons.
    assert np.mean([different(one) for one in result]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_same_drift_is_a_difference_if_repeats_are_ignored() -> None:
    """Shows that the test above can fail."""
    rng = np.random.default_rng(7)
    draw = drifting(3, 60, 0.1)

    assert np.mean([mannwhitneyu(draw(rng), draw(rng)).pvalue < 0.05 for _ in range(300)]) > 0.4


def test_requests_that_share_a_queue_cause_fewer_false_alarms_than_without_clusters() -> None:
    def queued(rng: np.random.Generator) -> Floats:
        noise, level = rng.normal(0, SIGMA * 0.6, 200), np.zeros(200)
        for number in range(1, 200):
            level[number] = 0.8 * level[number - 1] + noise[number]
        return 50 * np.exp(level)

    rng = np.random.default_rng(7)
    naive = np.mean([mannwhitneyu(queued(rng), queued(rng)).pvalue < 0.05 for _ in range(300)])
    clustered = np.mean([different(one) for one in differences(queued, queued, 300)])

    assert clustered < naive / 2


def test_shift_is_the_median_ratio_of_all_pairs() -> None:
    baseline, candidate = np.array([10.0, 20.0, 40.0]), np.array([20.0, 30.0, 60.0])

    result = latency_difference(sample(baseline), sample(candidate), 0.95, seed=1)

    assert result.shift == pytest.approx(np.median([after / before for after in candidate for before in baseline]) - 1)


def test_p_value_of_independent_requests_is_that_of_scipy() -> None:
    """Except for the t distribution and a design effect slightly above 1 by chance."""
    rng = np.random.default_rng(7)
    baseline, candidate = latencies()(rng), latencies(times=1.05)(rng)

    own, scipy_p = mann_whitney(sample(baseline), sample(candidate)), mannwhitneyu(baseline, candidate).pvalue

    assert scipy_p <= own <= 3 * scipy_p


@pytest.mark.parametrize(("smaller", "larger"), [(12, 5000), (20, 2500)])
def test_samples_of_very_different_sizes(smaller: int, larger: int) -> None:
    rng = np.random.default_rng(7)

    same = latency_difference(sample(latencies(smaller)(rng)), sample(latencies(larger)(rng)), 0.95, seed=1)
    other = latency_difference(sample(latencies(larger)(rng)), sample(latencies(smaller, 2.0)(rng)), 0.95, seed=1)

    assert not different(same)
    assert different(other)
    assert other.low < 1.0 < other.high


def test_constant_samples() -> None:
    same = latency_difference(sample(np.full(30, 5.0)), sample(np.full(30, 5.0)), 0.95, seed=1)
    other = latency_difference(sample(np.full(30, 5.0)), sample(np.full(30, 6.0)), 0.95, seed=1)

    assert (same.shift, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert [other.shift, other.low, other.high] == pytest.approx([0.2] * 3)
    assert other.p < 1e-6


def test_requests_without_the_metric_are_left_out() -> None:
    with_gaps = Sample.of([10.0, None, 20.0, None, 40.0], [0, 0, 1, 1, 1])

    assert [list(np.exp(cluster).round(6)) for cluster in with_gaps.clusters] == [[10.0], [20.0, 40.0]]


def test_zero_counts_as_the_resolution_of_the_results() -> None:
    assert latency_difference(sample(np.zeros(20)), sample(np.zeros(20)), 0.95, seed=1).shift == 0


def test_swapped_runs_give_the_inverse_shift() -> None:
    rng = np.random.default_rng(7)
    baseline, candidate = sample(latencies()(rng)), sample(latencies(150, 1.1)(rng))

    forward = latency_difference(baseline, candidate, 0.95, seed=1)
    back = latency_difference(candidate, baseline, 0.95, seed=1)

    assert back.shift == pytest.approx(1 / (1 + forward.shift) - 1)
    assert back.p == pytest.approx(forward.p)


def test_rates_of_repeats() -> None:
    result = rate_difference([100, 102, 98], [80, 82, 81], 0.95)

    assert result.shift == pytest.approx(-0.19, abs=0.01)
    assert result.low < result.shift < result.high < 0
    assert result.p < 0.01


@pytest.mark.parametrize(("candidate", "p"), [([100.0] * 3, 1.0), ([90.0] * 3, 0.0)])
def test_rates_without_variance(candidate: list[float], p: float) -> None:
    result = rate_difference([100.0] * 3, candidate, 0.95)

    assert [result.shift, result.p] == pytest.approx([candidate[0] / 100 - 1, p])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
