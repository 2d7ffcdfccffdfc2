"""Markdown, CSV, JUnit and the files of a run."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from perf import export
from perf.exits import Exit
from perf.formatting import format_number
from perf.html_report import render
from perf.report import main
from perf.results import Goodput, Resources, Run
from tests.perf import simulated_runs

EVERYTHING: dict[str, Any] = {"open_loop": True, "batch_profile": True, "find_max": True, "cost": True}


def rows(run: Run) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(export.csv(run))))


def cases(run: Run, outcome: str | None = None) -> list[ET.Element]:
    found = ET.fromstring(export.junit(run)).iter("testcase")
    return [case for case in found if outcome is None or case.find(outcome) is not None]


def test_markdown_has_a_table_and_the_conditions() -> None:
    run = simulated_runs.run(cost=True)
    text = export.markdown(run)
    for condition in (
        "AMD EPYC 9R14",
        "2 cores",
        "3f2c9d1",
        "python -m perf.suite --url http://localhost:8000 --seed 7",
    ):
        assert condition in text
    stage = run.stage("concurrency", "8 streams")
    assert stage is not None
    assert stage.ttft_ms is not None
    (row,) = [line for line in text.splitlines() if line.startswith("| 8 streams |")]
    assert f"| {format_number(stage.ttft_ms.p50)} / {format_number(stage.ttft_ms.p95)} |" in row
    assert f"| {format_number(stage.tokens_per_s)} | {format_number(stage.requests_per_s)} |" in row


def test_markdown_tables_are_rectangular_and_have_no_empty_columns() -> None:
    text = export.markdown(simulated_runs.run(**EVERYTHING, errors=True))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert not re.search(r"\| TTFT", table) or re.search(r"\| [\d.,]+ / [\d.,]+ \|", table)
    assert "TTFT" not in export.markdown(simulated_runs.run(streaming=False))


def test_markdown_marks_client_limited_runs() -> None:
    assert "Client-limited" in export.markdown(simulated_runs.run(client_limited=True))
    assert "Client-limited" not in export.markdown(simulated_runs.run())


def test_markdown_escapes_untrusted_texts() -> None:
    text = export.markdown(simulated_runs.run(**EVERYTHING, hostile=True))
    outside = re.sub(r"^```+bash\n.*?^```+$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "alert(1)" in outside
    assert not re.search(r"(?<!\\)[<>]", outside)
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_command_cannot_end_its_code_block() -> None:
    run = simulated_runs.run().model_copy(update={"command": ["perf", "--prompt", "a\n```\n# heading\n````\n"]})
    fence = re.findall(r"^(`{3,})bash\n", export.markdown(run), re.MULTILINE)[0]
    assert len(fence) == 5


def test_csv_has_a_row_per_stage_with_unrounded_values() -> None:
    run = simulated_runs.run(**EVERYTHING, errors=True)
    table = rows(run)
    assert [(row["scenario"], row["stage"]) for row in table] == [(stage.scenario, stage.name) for stage in run.stages]
    for stage, row in zip(run.stages, table, strict=True):
        assert float(row["tokens_per_s"]) == stage.tokens_per_s
        assert int(row["requests"]) == stage.requests
        assert int(row["failed"]) == sum(stage.errors.values())
        for metric in ("ttft", "ttft_service", "tpot", "itl", "e2e", "e2e_service"):
            times = getattr(stage, f"{metric}_ms")
            for part in ("mean", "min", "p50", "p90", "p95", "p99", "max"):
                cell = row[f"{metric}_{part}_ms"]
                assert cell == "" if times is None else float(cell) == getattr(times, part)


def test_csv_has_every_number_of_a_stage() -> None:
    """A new number of a stage needs a column; lists and nested values have columns of other names."""
    names = {name for name, _, _ in export.COLUMNS}
    stage = simulated_runs.run(open_loop=True).stages[-1]
    plain = {name for name, value in stage if isinstance(value, int | float)}
    assert plain <= names
    assert {f"goodput_{name}" for name in Goodput.model_fields} <= names
    assert {"client_cpu", "schedule_delay_p50_ms", "schedule_delay_p99_ms", "loop_lag_p99_ms", "achieved_rate"} <= names
    assert set(Resources.model_fields) <= names


def test_csv_columns_have_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--columns"]) == Exit.OK
    explained = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in explained] == export.csv(simulated_runs.run()).splitlines()[0].split(",")
    assert len({name for name, _ in explained}) == len(explained)


def test_csv_escapes_formulas() -> None:
    run = simulated_runs.run(hostile=True)
    run = run.model_copy(update={"target": run.target.model_copy(update={"model": '=HYPERLINK("http://x","y")'})})
    for row in rows(run):
        assert row["model"] == '\'=HYPERLINK("http://x","y")'
        for name, cell in row.items():
            number = re.fullmatch(r"-?[\d.e+-]+", cell)
            assert number or not cell.startswith(("=", "+", "-", "@")), name


def test_junit_has_a_suite_per_scenario_with_correct_counts() -> None:
    run = simulated_runs.run(**EVERYTHING, errors=True)
    root = ET.fromstring(export.junit(run))
    assert [suite.get("name") for suite in root] == [
        "single, closed loop",
        "batch, closed loop",
        "streaming, closed loop",
        "concurrency, closed loop",
        "rate, open loop",
        "batch-profile, closed loop",
        "verdict",
    ]
    for suite in [root, *root]:
        assert int(suite.get("tests", -1)) == len(list(suite.iter("testcase")))
        assert int(suite.get("failures", -1)) == len(list(suite.iter("failure")))
        assert int(suite.get("skipped", -1)) == len(list(suite.iter("skipped")))


def test_junit_fails_only_missed_bounds() -> None:
    run = simulated_runs.run(requests=80)
    stage = run.stage("concurrency", "32 streams")
    assert stage is not None
    (failure,) = cases(run, "failure")
    assert failure.get("name") == "32 streams: ttft_p95<250ms"
    assert [failure.findtext("failure")] == stage.missed


def test_junit_skips_bounds_that_were_not_measured() -> None:
    skipped = [case.get("name") for case in cases(simulated_runs.run(), "skipped")]
    assert "1 request: ttft_p95<250ms" in skipped
    assert not [name for name in skipped if name and "streams" in name]


def test_junit_fails_failed_requests_and_client_limited_stages() -> None:
    names = [case.get("name") or "" for case in cases(simulated_runs.run(errors=True, slo=None), "failure")]
    assert "8 streams: every request succeeds" in names
    names = [case.get("name") or "" for case in cases(simulated_runs.run(client_limited=True, slo=None), "failure")]
    assert names == ["32 streams: the client keeps up", "concurrency, 32 streams: the client was the bottleneck"]


def test_junit_verdict_follows_the_exit_code() -> None:
    good = simulated_runs.run(slo=None)
    assert cases(good, "failure") == []
    interrupted = good.model_copy(update={"verdict": good.verdict.model_copy(update={"exit_code": Exit.INTERRUPTED})})
    (failure,) = cases(interrupted, "failure")
    assert failure.findtext("failure") == "exit code 130"


def test_all_formats_name_skipped_scenarios() -> None:
    run = simulated_runs.run().model_copy(update={"skipped": {"batch-profile": "TGI has no call for several prompts"}})
    assert "all stages" in [case.get("name") for case in cases(run, "skipped")]
    assert "Skipped: batch-profile: TGI has no call for several prompts" in export.markdown(run)
    assert "TGI has no call for several prompts" in render(run)


def test_junit_does_not_fail_the_stages_of_a_search() -> None:
    run = simulated_runs.run(errors=True)
    probes = [stage.model_copy(update={"scenario": "find-max"}) for stage in run.stages]
    passed = run.model_copy(update={"stages": probes, "verdict": simulated_runs.run().verdict})
    assert cases(passed, "failure") == []


def test_junit_escapes_untrusted_texts() -> None:
    run = simulated_runs.run(**EVERYTHING, hostile=True)
    text = export.junit(run)
    assert "alert(1)" in html.unescape(text)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    assert len(cases(run, "failure")) >= len(run.stages)


def test_all_files_are_written_and_can_be_read_again(tmp_path: Path) -> None:
    run = simulated_runs.run(**EVERYTHING, errors=True)
    paths = export.write_all(run, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "report.html", "report.md", "results.csv", "junit.xml"]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    assert Run.read(paths[0]) == run
    assert export.write_all(run, paths[0].parent) == paths
    ET.parse(paths[4])
    assert json.loads(paths[0].read_text())["schema_version"] == 1


def test_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    export.write(path, "earlier")
    with pytest.raises(UnicodeEncodeError):
        export.write(path, "later \ud800")
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
