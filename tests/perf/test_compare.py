"""Two runs are told apart where they differ, and nowhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from perf import stats
from perf.compare import Comparison, ComparisonError, compare, main, markdown
from perf.comparison import Metric, Row, Verdict
from perf.exits import Exit
from perf.results import Load, Machine, Run
from tests.perf.run_factory import CLOSED, run, stage, target

pytestmark = pytest.mark.perf


def measured(seed: int, count: int = 200, slower: float = 1.0, repeats: int = 1, drift: float = 0.0) -> Run:
    """Log-normal latencies; `slower` is the TTFT's alone, `drift` the machine's between repeats."""
    rng = np.random.default_rng(seed)
    pace = np.repeat(np.exp(rng.normal(0, drift, repeats)), count // repeats)
    tokens = rng.integers(20, 60, count)
    ttft = rng.lognormal(math.log(50), 0.2, count) * slower * pace
    tpot = rng.lognormal(math.log(8), 0.2, count) * pace
    e2e = ttft + tpot * (tokens - 1)
    return run(
        stage(
            list(ttft),
            repeats=repeats,
            tpot_ms=list(tpot),
            e2e_ms=list(e2e),
            tokens=[int(each) for each in tokens],
            tokens_per_s=float(8e3 * tokens.sum() / e2e.sum()),
        )
    )


def row(comparison: Comparison, metric: Metric) -> Row:
    (found,) = (each for each in comparison.rows if each.metric == metric)
    return found


def called_different(comparison: Comparison) -> bool:
    return any(each.verdict in (Verdict.WORSE, Verdict.BETTER) for each in comparison.rows)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples a comparison where there are hundreds of comparisons."""
    monkeypatch.setattr(stats, "RESAMPLES", 400)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("repeats", [1, 5])
def test_runs_of_the_same_are_called_different_in_at_most_a_twentieth(repeats: int) -> None:
    pairs = [
        compare(measured(2 * seed, repeats=repeats), measured(2 * seed + 1, repeats=repeats)) for seed in range(200)
    ]

    assert all(len([each for each in pair.rows if each.p is not None]) >= 3 for pair in pairs)
    assert sum(map(called_different, pairs)) <= 10


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("repeats", "count"), [(3, 180), (5, 200)])
def test_a_machine_that_drifts_between_repeats_is_no_regression(repeats: int, count: int) -> None:
    pairs = [
        compare(*(measured(2 * seed + side, count, repeats=repeats, drift=0.05) for side in (0, 1)))
        for seed in range(200)
    ]

    assert sum(pair.exit_code == Exit.FAILED for pair in pairs) <= 10


@pytest.mark.usefixtures("quick")
def test_a_tenth_more_ttft_is_found_by_200_requests_a_side() -> None:
    pairs = [compare(measured(2 * seed), measured(2 * seed + 1, slower=1.1)) for seed in range(200)]

    assert sum(row(pair, "ttft").regression for pair in pairs) >= 190
    assert sum(row(pair, "tpot").verdict is not Verdict.SAME for pair in pairs) <= 10


def test_the_same_run_has_no_difference() -> None:
    found = compare(measured(1, repeats=5), measured(1, repeats=5))

    assert {each.verdict for each in found.rows} == {Verdict.SAME}
    assert all(each.shift == pytest.approx(0) for each in found.rows)
    assert (found.exit_code, found.conditions) == (Exit.OK, [])
    assert found.conclusion.startswith("Nothing got worse by 5 % or more, as far as 4 comparisons can tell.")


def test_a_regression() -> None:
    found = compare(measured(1), measured(2, slower=1.3))
    ttft = row(found, "ttft")

    assert ttft.verdict is Verdict.WORSE
    assert ttft.regression
    assert ttft.low is not None
    assert ttft.high is not None
    assert ttft.low < 0.3 < ttft.high
    assert found.exit_code == Exit.FAILED
    assert found.conclusion.startswith("Worse: ttft +")
    assert "concurrency, 8 streams" in found.conclusion


def test_an_improvement() -> None:
    found = compare(measured(1, slower=1.3), measured(2))

    assert row(found, "ttft").verdict is Verdict.BETTER
    assert found.exit_code == Exit.OK
    assert found.conclusion.startswith("Better: ttft -")


def test_what_is_certain_and_small_is_told_and_stops_nobody() -> None:
    baseline, candidate = measured(1, 2000), measured(2, 2000, slower=1.03)

    assert row(compare(baseline, candidate), "ttft").verdict is Verdict.WORSE
    assert not compare(baseline, candidate).regressions
    assert "worse (< 5 %)" in markdown(compare(baseline, candidate))
    assert compare(baseline, candidate, fail_on=0.0).exit_code == Exit.FAILED


def test_few_requests_are_too_few() -> None:
    found = compare(measured(1, 9), measured(2, 9, slower=3.0))

    assert {each.verdict for each in found.rows} == {Verdict.FEW}
    assert found.exit_code == Exit.OK
    assert found.conclusion.startswith("Nothing can be told")


def test_tokens_a_second_are_judged_by_repeats() -> None:
    one = compare(measured(1), measured(2))
    many = compare(measured(1, repeats=5), measured(2, repeats=5))

    assert row(one, "tokens_per_s").verdict is Verdict.FEW
    assert row(one, "tokens_per_s").shift is not None
    assert row(many, "tokens_per_s").samples == (5, 5)
    assert row(many, "tokens_per_s").verdict is Verdict.SAME


def test_fewer_tokens_a_second_are_worse() -> None:
    baseline = run(stage([50.0] * 40, repeats=4, e2e_ms=[900 + number % 7 for number in range(40)]))
    candidate = run(stage([50.0] * 40, repeats=4, e2e_ms=[1900 + number % 7 for number in range(40)]))

    found = row(compare(baseline, candidate), "tokens_per_s")

    # 100 tokens in 1.8 s, and in 2.8 s.
    assert found.shift == pytest.approx(1.8 / 2.8 - 1, abs=0.01)
    assert found.verdict is Verdict.WORSE
    assert found.regression


def test_more_failures_are_a_regression_however_fast_the_others_were() -> None:
    found = compare(run(stage([50.0] * 100)), run(stage([50.0] * 80, errors={"http 429": 20})))
    errors = row(found, "errors")

    assert (errors.baseline, errors.candidate, errors.shift) == (0, 20, None)
    assert errors.regression
    assert "20.0 % of requests failed, 0.0 % before" in found.conclusion


def test_failures_within_chance_are_none() -> None:
    found = compare(run(stage([50.0] * 100)), run(stage([50.0] * 99, errors={"timeout": 1})))

    assert row(found, "errors").verdict is Verdict.SAME


def test_answers_that_came_whole_have_no_ttft() -> None:
    found = compare(run(stage([None] * 50)), run(stage([None] * 50)))

    assert [each.metric for each in found.rows] == ["e2e", "tokens_per_s"]


def test_only_the_metrics_that_were_asked_for() -> None:
    found = compare(measured(1), measured(2), metrics=["tpot"])

    assert [each.metric for each in found.rows] == ["tpot"]


def test_conditions_that_differ_are_named() -> None:
    ours = run(stage([50.0] * 20))
    machine = Machine(processor="Xeon", cores=8, memory_gib=24, gpus=["L4"], system="Linux", python="3.11")
    theirs = run(
        stage([50.0] * 20, load=Load(loop="open", arrival="poisson", rate=4)),
        target=target(api="openai", model="other"),
        machine=machine,
        commit="b" * 40,
        settings={"max_tokens": 128, "seed": 7, "output": "elsewhere"},
    )

    found = compare(ours, theirs)
    told = {each.what: (each.baseline, each.candidate) for each in found.conditions}

    assert told["api"] == ("native", "openai")
    assert told["gpus"] == ("", "L4")
    assert told["max_tokens"] == ("64", "128")
    assert told["loop"] == ("closed", "open")
    assert {"commit", "model", "processor", "cores"} < told.keys()
    assert not {"seed", "output", "system"} & told.keys()
    assert any("api" in line and "loop" in line for line in found.cautions)


def test_one_repeat_is_cautioned_and_five_are_not() -> None:
    assert any("--repeats 5" in line for line in compare(measured(1), measured(2)).cautions)
    assert compare(measured(1, repeats=5), measured(2, repeats=5)).cautions == []


def test_stages_of_one_run_are_named_and_left_out() -> None:
    found = compare(run(stage([50.0] * 20), stage([50.0] * 20, name="16 streams")), run(stage([50.0] * 20)))

    assert {each.stage for each in found.rows} == {"8 streams"}
    assert any("16 streams" in line for line in found.cautions)


def test_no_stage_in_common() -> None:
    with pytest.raises(ComparisonError, match="no stage is in both runs: the baseline has concurrency, 8 streams"):
        compare(run(stage([50.0] * 20)), run(stage([50.0] * 20, name="1 stream")))


def test_a_client_that_was_the_limit_is_not_trusted() -> None:
    limited = run(stage([500.0] * 50, limited=["it used 97 % of its core"]))

    found = compare(run(stage([50.0] * 50)), limited)

    assert found.exit_code == Exit.CLIENT_LIMITED
    assert found.client_limited == ["candidate: concurrency, 8 streams: it used 97 % of its core"]
    assert found.conclusion.startswith("Not to be trusted")


def written(path: Path, document: Run) -> str:
    path.write_text(document.model_dump_json())
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    names = tmp_path / "a.json", tmp_path / "b.json"
    return written(names[0], measured(1)), written(names[1], measured(2, slower=1.3))


def test_the_command(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "compare.md"

    assert main([*files, "--output", str(report)]) == Exit.FAILED

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)
    assert any(line.startswith("ttft ms") and line.rstrip().endswith("worse") for line in lines)
    assert "Do not ship this" in " ".join(" ".join(lines).split())
    assert "| concurrency, 8 streams | ttft ms |" in report.read_text()


def test_the_command_says_the_same_twice(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(list(files))
    first = capsys.readouterr().out
    main(list(files))

    assert capsys.readouterr().out == first


def test_the_command_in_json(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--json", "--metrics", "tpot"]) == Exit.OK

    told = json.loads(capsys.readouterr().out)
    assert Comparison.model_validate(told).rows[0].metric == "tpot"
    assert told["rows"][0]["verdict"] == "no difference seen"


@pytest.mark.parametrize("given", ["5", "-1%", "x%", "nan%"])
def test_a_wrong_percentage(files: tuple[str, str], given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*files, f"--fail-on={given}"])

    assert stopped.value.code == Exit.USAGE
    assert "write 5% or 0%" in capsys.readouterr().err


def test_a_wrong_metric(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*files, "--metrics", "ttft,latency"])

    assert "'latency' is not one of ttft, tpot, e2e, tokens_per_s, errors" in capsys.readouterr().err


def test_a_file_that_is_no_run(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([files[0], str(tmp_path / "none.json")]) == Exit.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_to_compare(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = written(tmp_path / "c.json", run(stage([50.0] * 20, load=CLOSED, name="1 stream")))

    assert main([files[0], other]) == Exit.USAGE
    assert "no stage is in both runs" in capsys.readouterr().err
