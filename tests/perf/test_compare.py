"""Comparison of two runs: false alarms, detected changes, conditions and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from perf.compare import Comparison, ComparisonError, compare, main, markdown
from perf.comparison import Metric, Row, Verdict
from perf.exits import Exit
from perf.results import Load, Machine, Run
from tests.perf.run_factory import CLOSED, run, stage, target

pytestmark = pytest.mark.slow


def measured(seed: int, count: int = 200, slower: float = 1.0, repeats: int = 1, drift: float = 0.0) -> Run:
    """Log-normal latencies; `slower` scales TTFT only, `drift` is the variation of the machine's speed by repeat."""
    rng = np.random.default_rng(seed)
    speed = np.repeat(np.exp(rng.normal(0, drift, repeats)), count // repeats)
    tokens = rng.integers(20, 60, count)
    ttft = rng.lognormal(math.log(50), 0.2, count) * slower * speed
    tpot = rng.lognormal(math.log(8), 0.2, count) * speed
    e2e = ttft + tpot * (tokens - 1)
    return run(
        stage(
            list(ttft),
            repeats=repeats,
            tpot_ms=list(tpot),
            e2e_ms=list(e2e),
            tokens=[int(count) for count in tokens],
            tokens_per_s=float(8e3 * tokens.sum() / e2e.sum()),
        )
    )


def row(comparison: Comparison, metric: Metric) -> Row:
    (found,) = (each for each in comparison.rows if each.metric == metric)
    return found


def has_difference(comparison: Comparison) -> bool:
    return any(each.verdict in (Verdict.WORSE, Verdict.BETTER) for each in comparison.rows)


# Instead of 2,000, where there are hundreds of comparisons.
FEW_RESAMPLES = 400


@pytest.mark.ci
@pytest.mark.parametrize("repeats", [1, 5])
def test_equal_runs_differ_in_at_most_5_percent_of_comparisons(repeats: int) -> None:
    pairs = [
        compare(*(measured(2 * seed + side, repeats=repeats) for side in (0, 1)), resamples=FEW_RESAMPLES)
        for seed in range(200)
    ]

    assert all(len([each for each in pair.rows if each.p is not None]) >= 3 for pair in pairs)
    assert sum(map(has_difference, pairs)) <= 10


@pytest.mark.ci
@pytest.mark.parametrize(("repeats", "count"), [(3, 180), (5, 200)])
def test_drift_between_repeats_is_not_a_regression(repeats: int, count: int) -> None:
    pairs = [
        compare(
            *(measured(2 * seed + side, count, repeats=repeats, drift=0.05) for side in (0, 1)), resamples=FEW_RESAMPLES
        )
        for seed in range(200)
    ]

    assert sum(pair.exit_code == Exit.FAILED for pair in pairs) <= 10


def test_10_percent_more_ttft_is_detected_with_200_requests_per_run() -> None:
    pairs = [
        compare(measured(2 * seed), measured(2 * seed + 1, slower=1.1), resamples=FEW_RESAMPLES) for seed in range(200)
    ]

    assert sum(row(pair, "ttft").regression for pair in pairs) >= 190
    assert sum(row(pair, "tpot").verdict is not Verdict.SAME for pair in pairs) <= 10


def test_run_does_not_differ_from_itself() -> None:
    found = compare(measured(1, repeats=5), measured(1, repeats=5))

    assert {each.verdict for each in found.rows} == {Verdict.SAME}
    assert all(each.shift == pytest.approx(0) for each in found.rows)
    assert (found.exit_code, found.conditions) == (Exit.OK, [])
    assert found.conclusion.startswith("No regression of 5 % or more found in 4 comparisons.")


def test_regression() -> None:
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


def test_improvement() -> None:
    found = compare(measured(1, slower=1.3), measured(2))

    assert row(found, "ttft").verdict is Verdict.BETTER
    assert found.exit_code == Exit.OK
    assert found.conclusion.startswith("Better: ttft -")


def test_small_significant_change_is_reported_but_not_a_regression() -> None:
    baseline, candidate = measured(1, 2000), measured(2, 2000, slower=1.03)

    found = compare(baseline, candidate)
    assert row(found, "ttft").verdict is Verdict.WORSE
    assert not found.regressions
    assert "worse (< 5 %)" in markdown(found)
    assert compare(baseline, candidate, fail_on=0.0).exit_code == Exit.FAILED


def test_nine_requests_are_too_few() -> None:
    found = compare(measured(1, 9), measured(2, 9, slower=3.0))

    assert {each.verdict for each in found.rows} == {Verdict.TOO_FEW}
    assert found.exit_code == Exit.OK
    assert found.conclusion.startswith("No conclusion")


def test_throughput_needs_repeats() -> None:
    one = compare(measured(1), measured(2))
    many = compare(measured(1, repeats=5), measured(2, repeats=5))

    assert row(one, "tokens_per_s").verdict is Verdict.TOO_FEW
    assert row(one, "tokens_per_s").shift is not None
    assert row(many, "tokens_per_s").samples == (5, 5)
    assert row(many, "tokens_per_s").verdict is Verdict.SAME


def test_lower_throughput_is_worse() -> None:
    baseline = run(stage([50.0] * 40, repeats=4, e2e_ms=[900 + number % 7 for number in range(40)]))
    candidate = run(stage([50.0] * 40, repeats=4, e2e_ms=[1900 + number % 7 for number in range(40)]))

    found = row(compare(baseline, candidate), "tokens_per_s")

    # 100 tokens in 1.8 s and in 2.8 s
    assert found.shift == pytest.approx(1.8 / 2.8 - 1, abs=0.01)
    assert found.verdict is Verdict.WORSE
    assert found.regression


def test_more_failures_are_a_regression() -> None:
    found = compare(run(stage([50.0] * 100)), run(stage([50.0] * 80, errors={"http 429": 20})))
    errors = row(found, "errors")

    assert (errors.baseline, errors.candidate, errors.shift) == (0, 20, None)
    assert errors.regression
    assert "20.0 % of requests failed, 0.0 % before" in found.conclusion


def test_one_failure_in_100_is_not_a_regression() -> None:
    found = compare(run(stage([50.0] * 100)), run(stage([50.0] * 99, errors={"timeout": 1})))

    assert row(found, "errors").verdict is Verdict.SAME


def test_runs_without_streaming_have_no_ttft() -> None:
    found = compare(run(stage([None] * 50)), run(stage([None] * 50)))

    assert [each.metric for each in found.rows] == ["e2e", "tokens_per_s"]


def test_metrics_can_be_chosen() -> None:
    found = compare(measured(1), measured(2), metrics=["tpot"])

    assert [each.metric for each in found.rows] == ["tpot"]


def test_different_conditions_are_named() -> None:
    baseline = run(stage([50.0] * 20))
    machine = Machine(processor="Xeon", cores=8, memory_gib=24, gpus=["L4"], system="Linux", python="3.11")
    candidate = run(
        stage([50.0] * 20, load=Load(loop="open", arrival="poisson", rate=4)),
        target=target(api="openai", model="other"),
        machine=machine,
        commit="b" * 40,
        settings={"max_tokens": 128, "seed": 7, "output": "elsewhere"},
    )

    found = compare(baseline, candidate)
    conditions = {each.what: (each.baseline, each.candidate) for each in found.conditions}

    assert conditions["api"] == ("native", "openai")
    assert conditions["gpus"] == ("", "L4")
    assert conditions["max_tokens"] == ("64", "128")
    assert conditions["loop"] == ("closed", "open")
    assert {"commit", "model", "processor", "cores"} < conditions.keys()
    assert not {"seed", "output", "system"} & conditions.keys()
    assert any("api" in line and "loop" in line for line in found.cautions)


def test_one_repeat_has_a_caution_and_five_have_none() -> None:
    assert any("--repeats 5" in line for line in compare(measured(1), measured(2)).cautions)
    assert compare(measured(1, repeats=5), measured(2, repeats=5)).cautions == []


def test_stages_of_only_one_run_are_named_and_not_compared() -> None:
    found = compare(run(stage([50.0] * 20), stage([50.0] * 20, name="16 streams")), run(stage([50.0] * 20)))

    assert {each.stage for each in found.rows} == {"8 streams"}
    assert any("16 streams" in line for line in found.cautions)


def test_runs_without_a_common_stage_are_rejected() -> None:
    with pytest.raises(ComparisonError, match="no stage is in both runs: the baseline has concurrency, 8 streams"):
        compare(run(stage([50.0] * 20)), run(stage([50.0] * 20, name="1 stream")))


def test_client_limited_run_is_not_reliable() -> None:
    limited = run(stage([500.0] * 50, limited=["the client used 97 % of a core"]))

    found = compare(run(stage([50.0] * 50)), limited)

    assert found.exit_code == Exit.CLIENT_LIMITED
    assert found.client_limited == ["candidate: concurrency, 8 streams: the client used 97 % of a core"]
    assert found.conclusion.startswith("Not reliable")


def write(path: Path, document: Run) -> str:
    path.write_text(document.model_dump_json())
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    names = tmp_path / "a.json", tmp_path / "b.json"
    return write(names[0], measured(1)), write(names[1], measured(2, slower=1.3))


def test_command_prints_a_table_and_writes_markdown(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "compare.md"

    assert main([*files, "--output", str(report)]) == Exit.FAILED

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)
    assert any(line.startswith("ttft ms") and line.rstrip().endswith("worse") for line in lines)
    assert "Find the cause before you release this" in " ".join(" ".join(lines).split())
    assert "| concurrency, 8 streams | ttft ms |" in report.read_text()


def test_command_output_is_reproducible(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(list(files))
    first = capsys.readouterr().out
    main(list(files))

    assert capsys.readouterr().out == first


def test_command_prints_json(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--json", "--metrics", "tpot"]) == Exit.OK

    document = json.loads(capsys.readouterr().out)
    assert Comparison.model_validate(document).rows[0].metric == "tpot"
    assert document["rows"][0]["verdict"] == "no difference found"


@pytest.mark.parametrize("given", ["5", "-1%", "x%", "nan%"])
def test_invalid_percentage_is_rejected(files: tuple[str, str], given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*files, f"--fail-on={given}"])

    assert stopped.value.code == Exit.USAGE
    assert "write 5% or 0%" in capsys.readouterr().err


def test_unknown_metric_is_rejected(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*files, "--metrics", "ttft,latency"])

    assert "'latency' is not one of ttft, tpot, e2e, tokens_per_s, errors" in capsys.readouterr().err


def test_missing_file_is_reported_in_one_line(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([files[0], str(tmp_path / "none.json")]) == Exit.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_command_rejects_runs_without_a_common_stage(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "c.json", run(stage([50.0] * 20, load=CLOSED, name="1 stream")))

    assert main([files[0], other]) == Exit.USAGE
    assert "no stage is in both runs" in capsys.readouterr().err
