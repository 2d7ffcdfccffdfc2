"""The command `python -m perf.simulate`, its report, and the bars of the product."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from perf.simulate import options
from perf.simulate.__main__ import main
from perf.simulate.results import SimulationRun, summary
from perf.simulate.settings import MEANINGS, PRODUCT, STRATEGIES, Fleet, Job, Profile, Traffic
from perf.simulate.traffic import generate
from perf.simulate.verdict import backlog, backlog_bar
from tests.perf.parsed_report import ParsedReport
from tests.perf.service_simulation import BY_NAME, NO_LOSSES, SIMPLE, SMALL, one_replica, run, trace


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
