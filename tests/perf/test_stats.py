"""The statistics hold what they promise: false alarms, power, coverage. Seeded, so that they are the same each time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from perf import stats
from perf.stats import Difference, Floats, Sample, holm, latency_difference, mann_whitney, rate_difference

pytestmark = pytest.mark.perf

SIGMA = 0.2
Draw = Callable[[np.random.Generator], Floats]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples a comparison where there are hundreds of comparisons."""
    monkeypatch.setattr(stats, "RESAMPLES", 500)


def sample(ms: Floats, repeats: int = 1) -> Sample:
    return Sample.of(list(ms), list(np.arange(len(ms)) * repeats // len(ms)))


def latencies(count: int = 200, times: float = 1.0) -> Draw:
    return lambda rng: times * rng.lognormal(math.log(50), SIGMA, count)


def drifting(repeats: int, each: int, drift: float) -> Draw:
    """The machine has another pace in each repeat."""
    return lambda rng: np.concatenate(
        [rng.lognormal(math.log(50) + rng.normal(0, drift), SIGMA, each) for _ in range(repeats)]
    )


def differences(baseline: Draw, candidate: Draw, times: int, repeats: int = 1) -> list[Difference]:
    rng = np.random.default_rng(7)
    return [
        latency_difference(sample(baseline(rng), repeats), sample(candidate(rng), repeats), 0.95, seed=number)
        for number in range(times)
    ]


def different(found: Difference) -> bool:
    return found.p < 0.05 and not found.low <= 0 <= found.high


def covered(found: list[Difference], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("truth", [0.0, 0.1])
def test_the_interval_covers_the_truth_as_often_as_it_says(truth: float) -> None:
    found = differences(latencies(), latencies(times=1 + truth), 600)

    assert 0.93 <= covered(found, truth) <= 0.97


@pytest.mark.usefixtures("quick")
def test_the_interval_covers_the_truth_where_the_machine_drifts() -> None:
    found = differences(drifting(5, 40, 0.05), drifting(5, 40, 0.05), 400, repeats=5)

    assert 0.93 <= covered(found, 0.0) <= 0.98


@pytest.mark.usefixtures("quick")
def test_a_tenth_more_is_found() -> None:
    found = differences(latencies(), latencies(times=1.1), 300)

    assert np.mean([different(one) and one.shift >= 0.05 for one in found]) >= 0.95


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("repeats", [3, 5])
def test_drift_between_repeats_is_no_difference(repeats: int) -> None:
    found = differences(drifting(repeats, 60, 0.1), drifting(repeats, 60, 0.1), 300, repeats=repeats)

    # 0.05 is what one test promises; three standard errors of 300 tries on top.
    assert np.mean([different(one) for one in found]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_the_same_drift_alarms_where_repeats_are_not_told_apart() -> None:
    """So the test above tests something."""
    rng = np.random.default_rng(7)
    draw = drifting(3, 60, 0.1)

    assert np.mean([mannwhitneyu(draw(rng), draw(rng)).pvalue < 0.05 for _ in range(300)]) > 0.4


@pytest.mark.usefixtures("quick")
def test_neighbours_that_waited_in_the_same_queue_are_not_independent() -> None:
    def queued(rng: np.random.Generator) -> Floats:
        noise, level = rng.normal(0, SIGMA * 0.6, 200), np.zeros(200)
        for number in range(1, 200):
            level[number] = 0.8 * level[number - 1] + noise[number]
        return 50 * np.exp(level)

    rng = np.random.default_rng(7)
    naive = np.mean([mannwhitneyu(queued(rng), queued(rng)).pvalue < 0.05 for _ in range(300)])
    ours = np.mean([different(one) for one in differences(queued, queued, 300)])

    assert ours < naive / 2


def test_a_shift_is_the_median_ratio_of_all_pairs() -> None:
    baseline, candidate = np.array([10.0, 20.0, 40.0]), np.array([20.0, 30.0, 60.0])

    found = latency_difference(sample(baseline), sample(candidate), 0.95, seed=1)

    assert found.shift == pytest.approx(np.median([after / before for after in candidate for before in baseline]) - 1)


def test_independent_requests_have_the_p_value_of_scipy() -> None:
    """Up to t for normal and a design effect that chance makes a little more than 1."""
    rng = np.random.default_rng(7)
    baseline, candidate = latencies()(rng), latencies(times=1.05)(rng)

    ours, theirs = mann_whitney(sample(baseline), sample(candidate)), mannwhitneyu(baseline, candidate).pvalue

    assert theirs <= ours <= 3 * theirs


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


def test_requests_without_the_quantity_are_left_out() -> None:
    with_gaps = Sample.of([10.0, None, 20.0, None, 40.0], [0, 0, 1, 1, 1])

    assert [list(np.exp(cluster).round(6)) for cluster in with_gaps.clusters] == [[10.0], [20.0, 40.0]]


def test_zero_has_no_logarithm_and_is_the_least_that_is_written() -> None:
    assert latency_difference(sample(np.zeros(20)), sample(np.zeros(20)), 0.95, seed=1).shift == 0


def test_the_other_way_round_is_the_inverse() -> None:
    rng = np.random.default_rng(7)
    baseline, candidate = sample(latencies()(rng)), sample(latencies(150, 1.1)(rng))

    there = latency_difference(baseline, candidate, 0.95, seed=1)
    back = latency_difference(candidate, baseline, 0.95, seed=1)

    assert back.shift == pytest.approx(1 / (1 + there.shift) - 1)
    assert back.p == pytest.approx(there.p)


def test_rates_of_repeats() -> None:
    found = rate_difference([100, 102, 98], [80, 82, 81], 0.95)

    assert found.shift == pytest.approx(-0.19, abs=0.01)
    assert found.low < found.shift < found.high < 0
    assert found.p < 0.01


@pytest.mark.parametrize(("candidate", "p"), [([100.0] * 3, 1.0), ([90.0] * 3, 0.0)])
def test_rates_that_do_not_vary(candidate: list[float], p: float) -> None:
    found = rate_difference([100.0] * 3, candidate, 0.95)

    assert [found.shift, found.p] == pytest.approx([candidate[0] / 100 - 1, p])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
