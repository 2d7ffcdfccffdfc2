"""The HTML report and its command."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from perf import stages
from perf.exits import Exit
from perf.formatting import format_number, format_percent
from perf.html_report import render
from perf.report import main
from perf.results import ResultsError, Run
from tests.perf import simulated_runs
from tests.perf.parsed_report import ParsedReport

FULL: dict[str, Any] = {"open_loop": True, "batch_profile": True, "find_max": True, "cost": True, "errors": True}


@pytest.fixture(scope="module")
def full() -> Run:
    return simulated_runs.run(**FULL)


@pytest.fixture(scope="module")
def report(full: Run) -> ParsedReport:
    return ParsedReport(render(full))


def test_simulated_run_is_valid_and_reproducible(full: Run) -> None:
    assert Run.model_validate(json.loads(full.model_dump_json())) == full
    simulated_runs.stages_of.cache_clear()
    assert simulated_runs.run(**FULL) == full
    assert simulated_runs.run(8, **FULL) != full


def test_every_tag_is_closed_and_every_chart_is_well_formed(report: ParsedReport) -> None:
    assert report.unclosed == []
    assert len(report.charts()) > 30


def test_verdict_comes_first(full: Run) -> None:
    html = render(full)
    assert ParsedReport(html).headings[:2] == ["smollm2-135m", "Failed"]
    texts = [full.verdict.sentences[0], full.verdict.reasons[0], full.verdict.recommendations[0]]
    positions = [html.index(sentence) for sentence in texts]
    assert positions == sorted(positions)
    assert positions[-1] < html.index("<svg")


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, "Passed"),
        ({"slo": None}, "Completed"),
        ({"errors": True}, "Failed"),
        ({"client_limited": True}, "Client-limited"),
    ],
)
def test_status_is_one_word(options: dict[str, Any], status: str) -> None:
    assert ParsedReport(render(simulated_runs.run(**options))).headings[1] == status


@pytest.mark.parametrize("code", [2, 77])
def test_other_exit_codes_are_shown(code: int) -> None:
    run = simulated_runs.run()
    ended = run.model_copy(update={"verdict": run.verdict.model_copy(update={"exit_code": code})})
    assert ParsedReport(render(ended)).headings[1] == f"Exit code {code}"


def test_client_limited_run_has_a_warning() -> None:
    banner = "These metrics describe the client, not the server"
    run = simulated_runs.run(client_limited=True)
    html = render(run)
    assert banner in ParsedReport(html).headings
    assert run.stages[-1].client.limited[0] in html
    assert banner not in ParsedReport(render(simulated_runs.run())).headings


def test_table_of_stages_has_the_values_of_the_run(full: Run, report: ParsedReport) -> None:
    rows = [row for row in report.rows("Efficiency") if len(row) == 14]
    assert len(rows) == len(full.stages)
    for stage, row in zip(full.stages, rows, strict=True):
        times = [
            part for of in (stage.ttft_ms, stage.tpot_ms, stage.e2e_ms) for part in ((of.p50, of.p95) if of else "––")
        ]
        assert row[0] == stage.name
        assert row[1:3] == [format_number(stage.requests), format_number(sum(stage.errors.values()))]
        assert row[3:9] == [part if isinstance(part, str) else format_number(part) for part in times]
        assert row[9:11] == [format_number(stage.tokens_per_s), format_number(stage.requests_per_s)]
        assert row[11] == stages.efficiency(stage)
        assert row[12] == format_percent(stage.goodput.share if stage.goodput else None)


def test_row_shows_whether_the_objective_was_met() -> None:
    report = ParsedReport(render(simulated_runs.run(requests=80)))
    rows = {row[0]: row[-1] for row in report.rows("Objective") if len(row) > 5}
    assert rows["8 streams"] == "✓ met"
    assert rows["32 streams"] == "✗ TTFT p95"
    assert rows["16 prompts"] == "–"


def test_open_and_closed_loops_are_labelled(report: ParsedReport) -> None:
    assert {"Concurrency closed loop", "Rate open loop"} <= set(report.headings)
    assert "not comparable" in render(simulated_runs.run(open_loop=True))
    assert "not comparable" not in render(simulated_runs.run())


SECTIONS = {
    "Errors": {"errors": True},
    "Cost": {"cost": True},
    "Highest rate that meets the objective": {"find_max": True},
    "Rate open loop": {"open_loop": True},
    "Batch profile closed loop": {"batch_profile": True},
}


@pytest.mark.parametrize("head", SECTIONS)
def test_section_exists_if_it_has_content(head: str) -> None:
    assert head in ParsedReport(render(simulated_runs.run(**SECTIONS[head]))).headings  # type: ignore[arg-type]
    assert head not in ParsedReport(render(simulated_runs.run())).headings


def titles(run: Run) -> set[str]:
    return {svg.findtext("title") or "" for svg in ParsedReport(render(run)).charts()}


def test_chart_exists_if_it_has_data(full: Run) -> None:
    streaming_only = {
        "Time to first token against load",
        "Time to first token, distribution",
        "Time per output token, distribution",
        "Gaps between the chunks of a stream, distribution",
    }
    always = {"End to end against load", "End to end, distribution", "Throughput against load"}
    timed = {"Throughput over time", "Requests in flight over time"}
    named = titles(full)
    assert streaming_only | always | timed | {"Failed requests by kind", "Probed loads in order"} <= named
    assert always <= titles(simulated_runs.run(streaming=False))
    assert not streaming_only & titles(simulated_runs.run(streaming=False))
    assert not timed & titles(simulated_runs.run(bare=True))


def test_missing_values_leave_no_empty_section() -> None:
    bare = simulated_runs.run(bare=True)
    report = ParsedReport(render(bare))
    assert "Token counts of client and server" not in report.headings
    assert not {"Goodput", "Efficiency", "Objective", "Memory, MiB"} & {
        cell for table in report.tables for cell in table[0]
    }
    nothing = bare.model_copy(update={"stages": []})
    assert ParsedReport(render(nothing)).tables == []


def test_token_counts_are_compared(full: Run, report: ParsedReport) -> None:
    assert report.row("Server’s tokens", "single")[1:4] == [
        format_number(full.tokens[0].client),
        format_number(full.tokens[0].server),
        "✓ none",
    ]
    assert report.row("Server’s tokens", "batch-profile")[3] == "✗ +7"


def test_report_loads_no_resources(report: ParsedReport, full: Run) -> None:
    assert [link for link in report.links if not link.startswith("#")] == ["data:,"]
    html = render(full)
    assert not {"script", "iframe", "object", "embed", "img", "image", "use", "base"} & report.tags
    assert re.findall(r"url\(|@import|https?://(?!localhost:8000)", html) == []


def test_untrusted_texts_are_escaped() -> None:
    options: dict[str, Any] = {**FULL, "errors": False, "client_limited": True}
    plain, hostile = (
        ParsedReport(render(simulated_runs.run(**options))),
        ParsedReport(render(simulated_runs.run(**options, hostile=True))),
    )
    assert hostile.unclosed == []
    assert hostile.tags <= plain.tags | {"rect"}
    assert hostile.attributes <= plain.attributes
    assert [link for link in hostile.links if not link.startswith("#")] == ["data:,"]
    assert hostile.charts()
    html = render(simulated_runs.run(**options, hostile=True))
    assert "<script" not in html
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)


def test_long_texts_are_shortened() -> None:
    run = simulated_runs.run()
    long = run.model_copy(update={"command": ["x" * 3_000_000], "settings": {"prompt": "y" * 3_000_000}})
    assert len(render(long)) < len(render(run)) + 10_000


@pytest.mark.slow
def test_report_of_10_000_requests_takes_at_most_1_mb_and_3_s() -> None:
    run = simulated_runs.run(scenarios=("concurrency",), open_loop=True, requests=1000)
    assert sum(stage.requests for stage in run.stages) == 10_000
    started = time.process_time()
    html = render(run)
    assert time.process_time() - started <= 3
    assert len(html.encode()) <= 1_000_000


def test_chart_shows_at_most_8_levels() -> None:
    run = simulated_runs.run(scenarios=("concurrency",))
    rows = [run.stages[0].model_copy(update={"name": f"level {n}"}) for n in range(30)]
    html = render(run.model_copy(update={"stages": rows}))
    assert "8 of 30 levels." in html


def test_timeline_of_hours_is_downsampled() -> None:
    stage = simulated_runs.run(scenarios=("streaming",)).stages[0]
    hours = [stage.timeline[0].model_copy(update={"at_s": float(second)}) for second in range(7200)]
    run = simulated_runs.run(scenarios=("streaming",))
    html = render(run.model_copy(update={"stages": [stage.model_copy(update={"timeline": hours})]}))
    (chart,) = [svg for svg in ParsedReport(html).charts() if svg.findtext("title") == "Throughput over time"]
    (line,) = [path.get("d", "") for path in chart.iter("path") if (path.get("class") or "").startswith("line")]
    assert 100 <= line.count("L") + line.count("M") <= 200


def write(run: Run, folder: Path) -> Path:
    path = folder / "results.json"
    path.write_text(run.model_dump_json())
    return path


def test_command_writes_the_report_next_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(simulated_runs.run(), tmp_path))]) == Exit.OK
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(simulated_runs.run())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


@pytest.mark.parametrize(("format", "start"), [("md", "Model: "), ("csv", "started_at,"), ("junit", "<?xml ")])
def test_command_prints_other_formats(
    format: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write(simulated_runs.run(), tmp_path))
    assert main([run, "--format", format]) == Exit.OK
    text = capsys.readouterr().out
    assert text.startswith(start)
    output = tmp_path / "out"
    assert main([run, "--format", format, "--output", str(output)]) == Exit.OK
    assert output.read_text() == text


def test_command_reports_invalid_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(simulated_runs.run(), tmp_path)
    assert main([str(tmp_path / "none.json")]) == Exit.USAGE
    assert "none.json: No such file or directory" in capsys.readouterr().err
    assert main([str(run), "--output", str(tmp_path / "none" / "report.html")]) == Exit.USAGE
    assert "none/report.html: No such file or directory" in capsys.readouterr().err
    write(simulated_runs.run(slo=None).model_copy(update={"slo": "fast"}), tmp_path)
    assert main([str(run)]) == Exit.USAGE
    assert "invalid objective 'fast'" in capsys.readouterr().err
    run.write_text("{}")
    assert main([str(run)]) == Exit.USAGE
    assert "schema_version" in capsys.readouterr().err
    with pytest.raises(ResultsError):
        Run.read(run)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["x.json", "--format", "pdf"], 2)])
def test_command_prints_its_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert "python -m perf.report" in printed.out + printed.err
