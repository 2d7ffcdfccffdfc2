"""Assignment: every unit has one variant, the split is exact, and a ramp moves units in one direction only."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from serve_app.core.experiments import CLUSTERS, Caller
from serve_app.experiment_config import Experiment
from serve_app.gateway.assignment import (
    cluster_of,
    exposure,
    flips,
    is_counted,
    is_shadowed,
    place,
    regions,
    unit_of,
    variant_at,
)

USERS = [f"user-{number}" for number in range(2000)]
START = datetime(2026, 10, 1, tzinfo=UTC)


def experiment(*percent: float, name: str = "chat", **keys: Any) -> Experiment:
    variants = [{"name": "control", "model": "m"}]
    variants += [{"name": f"v{n}", "model": "m", "percent": one} for n, one in enumerate(percent)]  # type: ignore[dict-item]
    return Experiment.model_validate({"name": name, "variants": variants, **keys})


def assigned(experiment: Experiment, share: float = 1.0) -> dict[str, str]:
    return {user: variant_at(experiment, share, place(experiment.name, user)) for user in USERS}


def test_a_split_of_90_to_10_is_within_one_point_over_2000_users() -> None:
    counts = Counter(assigned(experiment(10)).values())
    assert abs(counts["v0"] / len(USERS) - 0.1) <= 0.01


def test_the_split_is_unbiased_for_all_names() -> None:
    """The shares of 200 experiments vary as those of random draws: 0.67 points, and 0.05 for their mean."""
    shares = [
        sum(place(name, user) < 10 for user in USERS) / len(USERS) for name in (f"experiment-{n}" for n in range(200))
    ]
    assert abs(sum(shares) / len(shares) - 0.1) < 0.0015
    deviation = (sum((share - 0.1) ** 2 for share in shares) / len(shares)) ** 0.5
    assert 0.0055 < deviation < 0.008


def test_places_never_change() -> None:
    """A changed hash would move every user of every experiment."""
    assert place("chat", "user-1") == pytest.approx(41.99588230153293, abs=1e-9)
    assert cluster_of("chat", "user-1") == 87


def test_two_experiments_are_independent() -> None:
    both = sum(place("a", user) < 50 and place("b", user) < 50 for user in USERS)
    assert abs(both / len(USERS) - 0.25) < 0.03


@pytest.mark.parametrize("percent", [(10,), (50, 30), (20, 30, 25), (10, 20, 30, 40)])
def test_a_ramp_moves_users_from_the_control_to_a_variant_only(percent: tuple[float, ...]) -> None:
    ramped = experiment(*percent)
    before = assigned(ramped, 0.0)
    assert set(before.values()) == {"control"}
    for step in range(1, 21):
        after = assigned(ramped, step / 20)
        assert all(before[user] in (after[user], "control") for user in USERS)
        before = after
    counts = Counter(before.values())
    for number, one in enumerate(percent):
        assert abs(counts[f"v{number}"] / len(USERS) - one / 100) < 0.03


@pytest.mark.parametrize(
    ("old", "new"), [((5,), (10,)), ((10,), (100,)), ((10, 10), (60, 40)), ((60, 40), (10, 40)), ((10, 0), (10, 90))]
)
def test_with_up_to_two_variants_a_change_of_their_percent_flips_no_user(
    old: tuple[float, ...], new: tuple[float, ...]
) -> None:
    before, after = assigned(experiment(*old)), assigned(experiment(*new))
    assert flips(experiment(*old), experiment(*new)) == []
    assert not [user for user in USERS if "control" not in (before[user], after[user]) and before[user] != after[user]]


def test_a_change_that_would_flip_users_is_found() -> None:
    old, new = experiment(20, 20, 20), experiment(40, 20, 20)
    before, after = assigned(old), assigned(new)
    moved = {(before[user], after[user]) for user in USERS if before[user] != after[user]}
    assert set(flips(old, new)) == {pair for pair in moved if "control" not in pair} == {("v2", "v0")}


def test_regions_do_not_overlap() -> None:
    found = sorted(regions(experiment(10, 20, 30, 40), 1.0), key=lambda region: region.low)
    assert [(round(one.low), round(one.high)) for one in found] == [(0, 10), (10, 40), (40, 80), (80, 100)]


def test_a_ramp_follows_its_schedule() -> None:
    steps = [{"at": START + timedelta(days=day), "percent": percent} for day, percent in ((0, 1), (1, 10), (3, 100))]
    ramped = experiment(50, ramp=steps)
    hours = {-1: 0.0, 0: 0.01, 23: 0.01, 24: 0.1, 71: 0.1, 72: 1.0, 1000: 1.0}
    assert {hour: exposure(ramped, START + timedelta(hours=hour)) for hour in hours} == hours
    assert exposure(experiment(50), START) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_the_counted_units_are_split_alike_at_every_step_of_a_ramp(share: float) -> None:
    ramped = experiment(20)
    counted = [user for user in USERS if is_counted(ramped, share, user)]
    assert abs(len(counted) / len(USERS) - share) < 0.03
    if share >= 0.3:
        found = assigned(ramped, share)
        assert abs(sum(found[user] == "v0" for user in counted) / len(counted) - 0.2) < 0.04


def test_no_unit_is_ever_counted_for_two_variants() -> None:
    ramped, seen = experiment(30, 30), dict[str, str]()
    for step in range(21):
        for user in USERS:
            if is_counted(ramped, step / 20, user):
                variant = variant_at(ramped, step / 20, place(ramped.name, user))
                assert seen.setdefault(user, variant) == variant
    assert len(seen) == len(USERS)


def test_clusters_are_uniform_and_independent_of_the_split() -> None:
    users = [f"u{number}" for number in range(20_000)]
    counts = Counter(cluster_of("chat", user) for user in users if place("chat", user) < 50)
    assert set(counts) == set(range(CLUSTERS))
    expected = 10_000 / CLUSTERS
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 190, "chi-squared, 127 degrees"


def test_the_unit_is_what_the_experiment_says() -> None:
    caller = Caller(key="k", user="u", session="s", request="r")
    found = {unit: unit_of(experiment(10, unit=unit), caller) for unit in ("key", "user", "session", "request")}
    assert found == {"key": "k", "user": "u", "session": "s", "request": "r"}


def test_the_share_of_mirrored_requests() -> None:
    shadowed = experiment(0, shadow={"variant": "v0", "percent": 25})
    assert abs(sum(is_shadowed(shadowed, user) for user in USERS) / len(USERS) - 0.25) < 0.03
    assert not any(is_shadowed(experiment(10), user) for user in USERS)
