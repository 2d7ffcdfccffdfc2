"""The number of replicas that a model needs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.core.scaling import (
    Demand,
    Objective,
    RecentHighest,
    RecentRate,
    ReplicaSpeed,
    Throughput,
    predicted_ttft_s,
    typical,
    wanted_replicas,
)

SPEED = ReplicaSpeed(prompt_rate=1000, answer_rate=200, start_s=5)
OBJECTIVE = Objective(target_ttft_s=2, slots=16)
MOST = 100

amounts = st.floats(0, 1e6)
demands = st.builds(
    Demand, st.integers(0, 500), st.integers(0, 500), amounts, amounts, st.floats(0, 1e5), st.floats(0, 1e4)
)
rates = st.just(0.0) | st.floats(0.1, 1e4)
speeds = st.builds(ReplicaSpeed, rates, rates, st.floats(0, 1), st.floats(0, 300), rates)
objectives = st.builds(Objective, st.floats(0.1, 30), st.integers(1, 256), st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(demands, speeds, objectives, st.integers(0, MOST), st.integers(1, MOST))
def test_the_number_is_within_its_bounds_and_no_request_is_left_alone(
    demand: Demand, speed: ReplicaSpeed, objective: Objective, current: int, most: int
) -> None:
    wanted = wanted_replicas(demand, speed, objective, current, most)
    assert min(objective.min_idle, most) <= wanted <= most
    if demand.requests:
        assert wanted >= 1


@settings(max_examples=300, deadline=None)
@given(demands, speeds, objectives, st.integers(1, MOST))
def test_the_wanted_number_is_stable(demand: Demand, speed: ReplicaSpeed, objective: Objective, current: int) -> None:
    """With the wanted number of replicas and the same work, no other number is wanted because of rate or slots."""
    calm = Demand(demand.running, 0, 0.0, demand.answer_tokens, demand.prompt_rate, demand.answer_rate)
    speed = ReplicaSpeed(speed.prompt_rate, speed.answer_rate, 0.0, speed.start_s)
    wanted = wanted_replicas(calm, speed, objective, current, MOST)
    assert wanted_replicas(calm, speed, objective, wanted, MOST) == wanted


def test_an_idle_model_needs_no_replica_but_those_that_are_kept_ready() -> None:
    assert wanted_replicas(Demand(), SPEED, OBJECTIVE, 3, MOST) == 0
    assert wanted_replicas(Demand(), SPEED, Objective(2, 16, min_idle=2), 3, MOST) == 2
    assert wanted_replicas(Demand(running=17), SPEED, Objective(2, 16, min_idle=2), 3, MOST) == 2 + 2


@pytest.mark.parametrize(("requests", "wanted"), [(1, 1), (16, 1), (20, 2), (64, 4)])
def test_the_first_start_of_an_unknown_model_gives_every_request_a_slot(requests: int, wanted: int) -> None:
    assert wanted_replicas(Demand(waiting=requests), ReplicaSpeed(), OBJECTIVE, 0, MOST) == wanted


def test_a_backlog_of_long_prompts_is_one_decision() -> None:
    """64 prompts of 2,000 tokens are 128 s of one replica, gone 5 s after a start of 5 s with 25 replicas."""
    backlog = Demand(waiting=64, prompt_tokens=64 * 2000, answer_tokens=64 * 100)
    first = wanted_replicas(backlog, SPEED, OBJECTIVE, 1, MOST)
    assert first == math.ceil((128 - 5) / 5)
    # While they start, the present replica works on, and no more are wanted.
    later = Demand(waiting=62, prompt_tokens=62 * 2000, answer_tokens=62 * 100)
    assert wanted_replicas(later, SPEED, OBJECTIVE, first, MOST) <= first


def test_a_backlog_that_the_present_replicas_clear_in_time_changes_nothing() -> None:
    assert wanted_replicas(Demand(running=8, waiting=2, prompt_tokens=1500), SPEED, OBJECTIVE, 1, MOST) == 1


def test_replicas_that_would_come_too_late_are_not_started() -> None:
    """3 s of work: gone before a replica that is started now is ready."""
    assert wanted_replicas(Demand(waiting=4, prompt_tokens=3000), SPEED, OBJECTIVE, 1, MOST) == 1


def test_waiting_for_a_slot_counts_as_work() -> None:
    """One replica with 16 slots: 48 answers of 100 tokens must end before the last of 64 requests begins, 24 s."""
    full = Demand(running=16, waiting=48, prompt_tokens=480, answer_tokens=6400)
    assert predicted_ttft_s(full, SPEED, OBJECTIVE, 1, 1) == pytest.approx(0.48 + 48 * 100 / 200)
    assert wanted_replicas(full, SPEED, OBJECTIVE, 1, MOST) > 1


def test_the_rate_at_which_work_arrives_needs_replicas_before_a_backlog_grows() -> None:
    steady = Demand(running=30, waiting=3, prompt_tokens=1500, prompt_rate=1000, answer_rate=300, answer_tokens=500)
    assert wanted_replicas(steady, SPEED, OBJECTIVE, 1, MOST) == math.ceil((1 + 1.5) / 0.8)


def test_replicas_that_were_never_busy_add_no_others() -> None:
    """Each of N replicas has shown the N-th part of what arrives: the rates alone would ask for 2.5 N, for every N."""
    demand = Demand(running=12, waiting=2, prompt_tokens=400, answer_tokens=600, prompt_rate=900, answer_rate=180)
    for current in (2, 4, 20):
        shown = ReplicaSpeed(900 / current, 180 / current, start_s=5)
        assert wanted_replicas(demand, shown, OBJECTIVE, current, MOST) <= 3


def test_the_open_requests_bound_the_rate() -> None:
    """Replicas without any waiting prompt compute none; 16 running requests fill the slots of one replica."""
    shown = ReplicaSpeed(10, 10, start_s=5)
    full = Demand(running=16, prompt_rate=1000, answer_rate=1000, answer_tokens=100)
    assert wanted_replicas(full, shown, OBJECTIVE, 1, MOST) == math.ceil(1 / 0.8)
    alone = Demand(running=0, waiting=1, prompt_tokens=5, prompt_rate=1000, answer_rate=1000)
    assert wanted_replicas(alone, shown, OBJECTIVE, 1, MOST) == 1


def test_fewer_replicas_are_wanted_only_if_the_work_fits_well() -> None:
    """Work for 3 replicas at 80 %: 4 stay, because 3 would have to compute more than 60 % of their time."""
    demand = Demand(running=20, waiting=3, prompt_tokens=100, prompt_rate=1200, answer_rate=240)
    assert wanted_replicas(demand, SPEED, OBJECTIVE, 3, MOST) == 3
    assert wanted_replicas(demand, SPEED, OBJECTIVE, 4, MOST) == 4
    assert wanted_replicas(demand, SPEED, OBJECTIVE, 9, MOST) == 4


def test_full_kv_caches_need_another_replica() -> None:
    full = ReplicaSpeed(1000, 200, kv_usage=0.95, start_s=5)
    assert wanted_replicas(Demand(running=5), full, OBJECTIVE, 2, MOST) == 3


def test_full_kv_caches_ask_once_while_the_new_replicas_start() -> None:
    full = ReplicaSpeed(1000, 200, kv_usage=0.95, start_s=60)
    demand, reports = Demand(running=10), [full, full]
    first = wanted_replicas(demand, typical(reports, 2), OBJECTIVE, 2, MOST)
    assert first == 3
    assert wanted_replicas(demand, typical(reports, first), OBJECTIVE, first, MOST) == first


def test_the_mean_speed_leaves_out_replicas_that_have_shown_none() -> None:
    speeds = [ReplicaSpeed(1000, 200, 0.5, 5), ReplicaSpeed(0, 100, 0.25, 7), ReplicaSpeed()]
    assert typical(speeds, 3) == ReplicaSpeed(1000, 150, 0.25, 7)
    assert typical(speeds, 6).kv_usage == 0.125, "three replicas start, and hold nothing"
    assert typical(speeds, 1).kv_usage == 0.25, "two more have reported than are known to run"
    assert typical([], 0) == ReplicaSpeed()


def test_a_speed_is_the_highest_of_a_few_seconds_and_is_forgotten_slowly() -> None:
    throughput = Throughput()
    for second in range(11):
        shown = throughput.observe(second, second * 50)
    assert shown == pytest.approx(50, rel=0.02)
    for second in range(11, 21):
        shown = throughput.observe(second, 500)
    assert 48 < shown < 50, "idle seconds say nothing about the speed"
    assert throughput.observe(20 + 600, 500) == pytest.approx(shown / 2)


def test_one_moment_is_no_speed() -> None:
    throughput = Throughput()
    throughput.observe(0, 0)
    assert throughput.observe(1, 1_000_000) == 0


def test_a_rate_is_the_mean_of_the_last_half_minute() -> None:
    rate = RecentRate()
    for second in range(300):
        rate.add(10, second)
    assert rate.value(299) == pytest.approx(10, rel=0.05)
    assert rate.value(299 + 30) == pytest.approx(10 / math.e, rel=0.05)
    assert rate.value(299 + 600) < 1e-6


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(0, 20)), max_size=40), st.integers(0, 20))
def test_no_more_replicas_are_stopped_than_a_minute_allows(steps: list[tuple[float, int]], target: int) -> None:
    highest, now, seen = RecentHighest(60), 0.0, list[tuple[float, int]]()
    for pause, wanted in steps:
        now += pause
        seen.append((now, wanted))
        asked = highest.limit(wanted, target, now)
        assert (asked > target, asked == target, asked < target) == (wanted > target, wanted == target, wanted < target)
        most = max(number for at, number in seen if at > now - 60)
        assert asked == (wanted if wanted >= target else min(most, target - 1))
        assert RecentHighest(0).limit(wanted, target, now) == wanted
