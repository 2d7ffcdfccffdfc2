"""The simulation: exact results of small cases, what must hold in every case, and its command."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perf.simulate import options
from perf.simulate.__main__ import main
from perf.simulate.cache import BlockCache
from perf.simulate.cluster import Cluster, Outcome
from perf.simulate.replica import Replica, Request
from perf.simulate.results import SimulationRun, summary
from perf.simulate.runner import run_one
from perf.simulate.scalers import Delay, Oracle, RayByRequests, View, computed_once
from perf.simulate.settings import MEANINGS, PRODUCT, STRATEGIES, Burst, Fleet, Job, Losses, Profile, Strategy, Traffic
from perf.simulate.traffic import Trace, generate
from perf.simulate.verdict import backlog, backlog_bar
from serve_app.core.scaling import Demand
from tests.perf.parsed_report import ParsedReport

# 100 tokens of a prompt per second, 10 tokens of an answer per second and sequence, and no limit of all together.
SIMPLE = Profile(start_s=5, prompt_rate=100, answer_rate=1e9, alone_rate=10, step_tokens=50, slots=2)
NO_LOSSES = Losses(per_hour=0)
SMALL = Traffic(users=40_000, seconds=90, bursts=(Burst(30, 20, 4.0),))
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
# Many losses, so that each kind occurs within 90 s.
LOSSES = Losses(per_hour=30, noticed=0.5, notice_s=10)


def trace(at: list[float], prompt: list[int], answer: list[int], seconds: float = 100.0) -> Trace:
    count = len(at)
    numbers, zeros = np.arange(count), np.zeros(count, dtype=np.int64)
    return Trace(
        np.array(at), numbers, numbers, zeros, zeros, np.array(prompt), np.array(answer), zeros.astype(bool), seconds
    )


def run(job: Job, requests: Trace) -> Outcome:
    return Cluster(job, requests).run()


def one_replica(profile: Profile, requests: Trace) -> Outcome:
    job = Job(BY_NAME["round-robin"], profile, Traffic(), NO_LOSSES, Fleet(most=1), 1)
    return run(job, requests)


def small(strategy: Strategy, losses: Losses = LOSSES, start_s: float = 5.0, **fleet: int) -> Outcome:
    bounds = replace(Fleet(most=12, max_queued=160), **fleet)
    job = Job(strategy, Profile(start_s=start_s), SMALL, losses, bounds, 3)
    return run(job, generate(SMALL, 3))


# Small cases


def test_one_request_takes_its_prompt_and_its_answer() -> None:
    (request,) = one_replica(SIMPLE, trace([1.0], [200], [11])).requests
    assert request.began == pytest.approx(1.0)
    assert request.first == pytest.approx(1.0 + 200 / 100)
    assert request.ended == pytest.approx(3.0 + 10 / 10), "the first token comes with the prompt"


def test_prompts_wait_for_each_other_and_slow_down_those_that_decode() -> None:
    """The second prompt is computed in chunks of 49 tokens, since one row of each step decodes.

    A step takes 0.1 + 0.49 s, so that 98 tokens take two steps, in which the first request decodes 2 of its 10 tokens.
    """
    first, second = one_replica(SIMPLE, trace([0.0, 0.0], [200, 98], [11, 1])).requests
    assert first.first == pytest.approx(2.0)
    assert second.began == pytest.approx(2.0)
    assert second.first == second.ended == pytest.approx(2.0 + 2 * 0.59)
    assert first.ended == pytest.approx(2.0 + 2 * 0.59 + 8 * 0.1)


def test_a_request_waits_for_a_slot() -> None:
    requests = one_replica(SIMPLE, trace([0.0, 0.0, 0.0], [100, 100, 100], [101, 101, 1])).requests
    assert requests[2].began == pytest.approx(min(request.ended or math.inf for request in requests[:2]))


def test_all_sequences_share_the_speed_of_the_replica() -> None:
    """Four sequences of 101 tokens at 20 tokens per second together."""
    profile = replace(SIMPLE, prompt_rate=1e9, answer_rate=20, slots=4)
    requests = one_replica(profile, trace([0.0] * 4, [10] * 4, [101] * 4)).requests
    assert [request.ended for request in requests] == pytest.approx([100 / 5] * 4, rel=5e-3)


def test_the_queue_is_that_of_the_theory() -> None:
    """Poisson arrivals at one slot with a constant time of service (M/D/1): mean wait rho S / (2 (1 - rho))."""
    rng, service_s, rho = np.random.default_rng(5), 2.0, 0.7
    at = np.cumsum(rng.exponential(service_s / rho, 6_000))
    profile = replace(SIMPLE, slots=1, max_ongoing=1)
    job = Job(BY_NAME["round-robin"], profile, Traffic(), NO_LOSSES, Fleet(most=1, max_queued=10**6, timeout_s=1e9), 1)
    requests = trace(at.tolist(), [100] * len(at), [11] * len(at), float(at[-1]))
    waits = [(request.began or math.inf) - request.arrived for request in run(job, requests).requests]
    assert np.mean(waits) == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.15)
    # Lindley's recursion gives each wait exactly.
    expected, free = [], 0.0
    for arrived in at:
        expected.append(max(0.0, free - arrived))
        free = max(free, arrived) + service_s
    assert waits == pytest.approx(expected, abs=1e-5)


def test_a_known_prefix_is_not_computed_again() -> None:
    replica = Replica("a", replace(SIMPLE, block_tokens=10), 0.0)
    known = BlockCache(100)
    known.add([1, 2, 3])
    replica.cache = known
    request = Request(0, 0.0, 45, 1, array("Q", [1, 2, 9, 8]), array("Q", [1, 2, 9, 8]))
    replica.submit(request, 0.0)
    assert request.cached == 20
    assert replica.next_at() == pytest.approx(0.25)


def test_the_cache_frees_the_end_of_the_prompt_that_was_not_used_for_longest() -> None:
    cache = BlockCache(4)
    cache.add([1, 2, 3])
    cache.add([1, 7])
    assert (cache.matched([1, 2, 3]), len(cache)) == (3, 4)
    cache.add([8])
    assert (cache.matched([1, 2, 3]), cache.matched([1, 7])) == (2, 2)


def test_a_lost_replica_computed_what_it_had_time_for() -> None:
    replica = Replica("a", SIMPLE, 0.0)
    requests = [Request(number, 0.0, 100, 50, array("Q"), array("Q")) for number in range(2)]
    for request in requests:
        replica.submit(request, 0.0)
    replica.step(replica.next_at())
    replica.lose(1.0 + 0.59)
    assert replica.abandon() == [requests[1], requests[0]]
    assert [request.resumed for request in requests] == [2, 0], "the first token, and one of one step"
    replica.advance(100.0)
    assert requests[1].remaining == pytest.approx(100 - 49)


# What must hold in every case


@pytest.mark.parametrize("name", BY_NAME)
def test_every_request_ends_once_and_no_replica_exceeds_its_slots(name: str) -> None:
    outcome = small(BY_NAME[name])
    assert len(outcome.requests) == len(generate(SMALL, 3)) > 300
    for request in outcome.requests:
        assert request.ended is not None
        assert request.ended >= request.arrived
        assert request.error in ("", "lost", "refused")
        if not request.error:
            assert request.began is not None
            assert request.first is not None
            assert request.arrived <= request.began < request.first <= request.ended
            assert 0 <= request.cached < request.prompt
    assert 0 < outcome.most_running <= Profile().slots
    assert outcome.lost_replicas > 0


def test_only_strategies_that_resume_lose_no_request() -> None:
    sudden = Losses(per_hour=60, noticed=0)
    product = small(PRODUCT, sudden)
    assert product.resumed > 0
    assert not any(request.error for request in product.requests)
    assert any(request.error == "lost" for request in small(BY_NAME["ray-16"], sudden).requests)


def test_a_full_queue_refuses_requests() -> None:
    outcome = small(PRODUCT, NO_LOSSES, start_s=180, most=1, max_queued=5)
    assert any(request.error == "refused" for request in outcome.requests)
    assert outcome.most_running == Profile().slots


def test_replicas_are_paid_from_their_start_to_their_end() -> None:
    """One replica all the time, and no other."""
    assert one_replica(SIMPLE, trace([0.0], [10], [5], seconds=60.0)).replica_s == pytest.approx(60.0)


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    job = Job(PRODUCT, Profile(start_s=5), SMALL, LOSSES, Fleet(most=12), 3)
    times = {"routing_ms", "decision_ms", "cpu_s"}
    first, second = (run_one(job).model_dump(exclude=times) for _ in range(2))
    assert first == second
    assert run_one(replace(job, seed=4)).model_dump(exclude=times) != first


# Traffic


def test_conversations_grow_and_families_are_shared() -> None:
    requests = generate(replace(SMALL, users=400_000), 1)
    assert np.all(np.diff(requests.at) >= 0)
    assert 0 <= requests.at[0] <= requests.at[-1] < SMALL.seconds
    order = np.lexsort((requests.at, requests.session))
    same = np.diff(requests.session[order]) == 0
    assert same.sum() > 500
    assert np.all(np.diff(requests.prompt[order])[same] > 0)
    assert np.all(np.diff(requests.family[order])[same] == 0)
    first, second = order[:-1][same][0], order[1:][same][0]
    tokens = int(requests.prompt[first] + requests.answer[first])
    before, after = (requests.digests(int(number), tokens, 64) for number in (first, second))
    assert before == after, "the prompt of the second request begins with the first one and its answer"
    sizes = np.sort(np.bincount(requests.family))[::-1]
    assert sizes[0] > 5 * sizes[20] > 0, "Zipf"


def test_the_rate_follows_the_day_and_the_users() -> None:
    day = Traffic(users=20_000, seconds=86_400, from_hour=0, bursts=(), think_s=5)
    hours = np.bincount((generate(day, 1).at // 3600).astype(int), minlength=24)
    assert hours.sum() == pytest.approx(20_000 * day.sessions_per_day * day.turns, rel=0.03)
    assert hours[15] / hours[3] == pytest.approx(1.6 / 0.4, rel=0.15)


# The policies that the product is compared with


def test_rays_policy_decides_as_ray_does() -> None:
    """Random numbers of requests for an hour, with Ray's own functions beside ours."""
    policy = pytest.importorskip("ray.serve.autoscaling_policy")
    ray_config = pytest.importorskip("ray.serve.config")
    rng = random.Random(1)
    config = ray_config.AutoscalingConfig(
        max_replicas=100, target_ongoing_requests=4, upscale_delay_s=30, downscale_delay_s=60
    )
    ours, theirs, delay = 3, 3, Delay(30, 60)
    state: dict[str, Any] = {}
    scaler, requests = RayByRequests(4), 10
    clock: dict[str, float] = {}
    original = policy._apply_delay_logic
    policy._apply_delay_logic = lambda *args: original(*args, _now=clock["now"])
    decide = policy._apply_autoscaling_config(policy.replica_queue_length_autoscaling_policy)
    try:
        changes = 0
        for tick in range(7200):
            now = clock["now"] = tick * 0.5
            if rng.random() < 0.02:
                requests = rng.choice([3, 20, 60, 200])
            view = View(ours, ours, 100, requests, Demand, [])
            wanted = scaler.wanted(view, now)
            total = scaler.mean(now)
            context = ray_config.AutoscalingContext(
                None, "d", "a", theirs, theirs, [], total, 0.0, {}, {}, 1, 100, state, None, None, now, config
            )
            decided, state = decide(context)
            theirs = min(100, max(1, math.ceil(decided)))
            before, ours = ours, min(100, max(1, delay.apply(wanted, ours, now)))
            changes += before != ours
            assert ours == theirs, now
    finally:
        policy._apply_delay_logic = original
    assert changes > 20


def test_rays_metric_is_as_old_as_its_reports() -> None:
    """The mean of the last 30 s, recorded every 6 s and sent every 10 s."""
    scaler = RayByRequests(1)

    def wanted(now: float, requests: int) -> int:
        return scaler.wanted(View(1, 1, 1000, requests, Demand, []), now)

    assert [wanted(now * 0.5, 10) for now in range(120)] == [10] * 120
    assert [wanted(60.0, 10), wanted(60.5, 10)] == [10, 10]
    assert {wanted(61 + now * 0.5, 100) for now in range(18)} == {10}
    assert wanted(70.0, 100) > 10
    assert [wanted(70.5 + now * 0.5, 100) for now in range(100)][-1] == 100


def test_the_oracle_has_replicas_when_the_work_comes() -> None:
    oracle = Oracle(np.array([0.8] * 100 + [8.0] * 100 + [0.8] * 100), start_s=20)

    def at(now: float) -> int:
        return oracle.wanted(View(1, 1, 100, 0, Demand, []), now)

    assert (at(0), at(81), at(150), at(250)) == (1, 10, 10, 1)


def test_the_oracle_counts_each_block_once() -> None:
    assert computed_once(trace([0.0, 1.0], [640, 640], [64, 64]), 64) == [640, 640]
    twice = trace([0.0, 1.0], [640, 768], [64, 64])
    twice.session[:] = 0
    assert computed_once(twice, 64) == [640, 768 - 704]


# The bars and the command


@pytest.mark.parametrize("start_s", [5.0, 60.0, 180.0])
def test_a_backlog_of_long_prompts_is_one_decision(start_s: float) -> None:
    outcome = backlog(Profile(start_s=start_s), 1)
    assert not any(request.error for request in outcome.requests)
    bar = backlog_bar(Profile(start_s=start_s), 1)
    assert bar.met, bar.measured


def test_a_small_steady_load_does_not_add_replicas() -> None:
    """Replicas that are not busy show less than their speed, which must not add replicas without end."""
    traffic = Traffic(users=40_000, seconds=400, bursts=())
    job = Job(PRODUCT, Profile(start_s=5), traffic, NO_LOSSES, Fleet(most=100), 1)
    outcome = run(job, generate(traffic, 1))
    assert max(sample.target for sample in outcome.samples) <= 2 * outcome.first_target


def test_directions_and_flaps_are_counted() -> None:
    job = Job(PRODUCT, SIMPLE, SMALL, NO_LOSSES, Fleet(), 1)
    outcome = one_replica(SIMPLE, trace([0.0], [10], [5]))
    outcome.first_target, outcome.decisions = 2, [(10.0, 4), (20.0, 8), (30.0, 7), (500.0, 8), (501.0, 9)]
    result = summary(job, outcome)
    assert (result.decisions, result.direction_changes, result.flaps) == (5, 2, 1)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "perf.simulate", *arguments]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("simulate")
    done = subprocess.run(command("--quick", "--output", str(folder)), capture_output=True, text=True, check=False)
    return folder, done


def test_the_command_writes_its_results_and_a_report(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = quick
    assert done.returncode in (0, 1), done.stderr
    results = SimulationRun.model_validate_json((folder / "results.json").read_text())
    assert [one.strategy for one in results.simulations] == [strategy.name for strategy in STRATEGIES]
    assert done.returncode == (0 if all(bar.met for bar in results.bars) else 1)
    assert all(name in done.stdout for name in MEANINGS)
    report = ParsedReport((folder / "report.html").read_text())
    assert report.unclosed == []
    assert not [link for link in report.links if not link.startswith(("#", "data:"))]
    assert "script" not in report.tags
    assert len(report.charts()) == 6
    rows = report.rows("Routing p99, ms")
    assert [row[0] for row in rows[2:]] == [strategy.name for strategy in STRATEGIES]


def test_results_do_not_depend_on_the_process(
    quick: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Names of replicas have other hashes in another process."""
    folder, _ = quick
    environment: dict[str, Any] = {**os.environ, "PYTHONHASHSEED": "5"}
    subprocess.run(command("--quick", "--only", "product", "--output", str(tmp_path)), env=environment, check=False)
    runs = [json.loads((path / "results.json").read_text())["simulations"][0] for path in (folder, tmp_path)]
    for one in runs:
        for name in ("routing_ms", "decision_ms", "cpu_s"):
            del one[name]
    assert runs[0] == runs[1]


def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    running = subprocess.Popen(
        command("--scale", "day", "--output", str(tmp_path)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stderr is not None
    assert "%" in running.stderr.readline(), "the progress"
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; no results were written"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process goes on")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "product,other"], "unknown strategy 'other'"),
        (["--losses", "-1"], "at least 0"),
        (["--instance-type", "nothing"], "unknown instance type"),
        (["--start", "soon"], "invalid duration"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_every_strategy_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(MEANINGS) == list(BY_NAME)
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(STRATEGIES)
    assert {strategy.name for scale in options.SCALES.values() for strategy in scale.strategies} <= set(BY_NAME)
