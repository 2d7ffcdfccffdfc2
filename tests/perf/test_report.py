from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from perf import stages
from perf.exits import Exit
from perf.page import render
from perf.report import main
from perf.results import ResultsError, Run
from perf.words import figure, percent
from tests.perf import sample
from tests.perf.page import Page

FULL: dict[str, Any] = {"open_loop": True, "batch_profile": True, "find_max": True, "cost": True, "errors": True}


@pytest.fixture(scope="module")
def full() -> Run:
    return sample.run(**FULL)


@pytest.fixture(scope="module")
def page(full: Run) -> Page:
    return Page(render(full))


def test_the_sample_is_a_run_and_the_same_again(full: Run) -> None:
    assert Run.model_validate(json.loads(full.model_dump_json())) == full
    sample.stages_of.cache_clear()
    assert sample.run(**FULL) == full
    assert sample.run(8, **FULL) != full


def test_every_tag_is_closed_and_every_drawing_is_well_formed(page: Page) -> None:
    assert page.unclosed == []
    assert len(page.drawings()) > 30


def test_the_verdict_comes_first(full: Run) -> None:
    html = render(full)
    assert Page(html).headings[:2] == ["smollm2-135m", "Failed"]
    said = [full.verdict.sentences[0], full.verdict.reasons[0], full.verdict.recommendations[0]]
    places = [html.index(sentence) for sentence in said]
    assert places == sorted(places)
    assert places[-1] < html.index("<svg")


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({}, "Passed"),
        ({"slo": None}, "Completed"),
        ({"errors": True}, "Failed"),
        ({"client_limited": True}, "Client-limited"),
    ],
)
def test_the_verdict_in_one_word(options: dict[str, Any], state: str) -> None:
    assert Page(render(sample.run(**options))).headings[1] == state


@pytest.mark.parametrize("code", [2, 77])
def test_any_exit_code_has_a_word(code: int) -> None:
    run = sample.run()
    ended = run.model_copy(update={"verdict": run.verdict.model_copy(update={"exit_code": code})})
    assert Page(render(ended)).headings[1] == f"Exit code {code}"


def test_figures_of_the_client_are_called_so() -> None:
    banner = "These figures are the client’s, not the server’s"
    run = sample.run(client_limited=True)
    html = render(run)
    assert banner in Page(html).headings
    assert run.stages[-1].client.limited[0] in html
    assert banner not in Page(render(sample.run())).headings


def test_the_tables_say_what_the_run_says(full: Run, page: Page) -> None:
    rows = [row for row in page.rows("Efficiency") if len(row) == 14]
    assert len(rows) == len(full.stages)
    for stage, row in zip(full.stages, rows, strict=True):
        times = [
            part for of in (stage.ttft_ms, stage.tpot_ms, stage.e2e_ms) for part in ((of.p50, of.p95) if of else "––")
        ]
        assert row[0] == stage.name
        assert row[1:3] == [figure(stage.requests), figure(sum(stage.errors.values()))]
        assert row[3:9] == [part if isinstance(part, str) else figure(part) for part in times]
        assert row[9:11] == [figure(stage.tokens_per_s), figure(stage.requests_per_s)]
        assert row[11] == stages.efficiency(stage)
        assert row[12] == percent(stage.goodput.share if stage.goodput else None)


def test_a_row_says_whether_the_objective_was_kept() -> None:
    page = Page(render(sample.run(requests=80)))
    rows = {row[0]: row[-1] for row in page.rows("Objective") if len(row) > 5}
    assert rows["8 streams"] == "✓ kept"
    assert rows["32 streams"] == "✗ TTFT p95"
    assert rows["16 prompts"] == "–"


def test_open_and_closed_loops_are_told_apart(page: Page) -> None:
    assert {"Concurrency closed loop", "Rate open loop"} <= set(page.headings)
    assert "not comparable" in render(sample.run(open_loop=True))
    assert "not comparable" not in render(sample.run())


SECTIONS = {
    "Errors": {"errors": True},
    "Cost": {"cost": True},
    "Highest rate that meets the objective": {"find_max": True},
    "Rate open loop": {"open_loop": True},
    "Batch profile closed loop": {"batch_profile": True},
}


@pytest.mark.parametrize("head", SECTIONS)
def test_a_section_is_there_if_there_is_something_in_it(head: str) -> None:
    assert head in Page(render(sample.run(**SECTIONS[head]))).headings  # type: ignore[arg-type]
    assert head not in Page(render(sample.run())).headings


def titles(run: Run) -> set[str]:
    return {svg.findtext("title") or "" for svg in Page(render(run)).drawings()}


def test_a_chart_is_there_if_there_is_something_in_it(full: Run) -> None:
    live = {
        "Time to first token against load",
        "Time to first token, distribution",
        "Time per output token, distribution",
        "Gaps between the events of a stream, distribution",
    }
    always = {"End to end against load", "End to end, distribution", "Throughput against load"}
    timed = {"Throughput over time", "Requests in flight over time"}
    named = titles(full)
    assert live | always | timed | {"Failed requests by kind", "Loads tried, in order"} <= named
    assert always <= titles(sample.run(streaming=False))
    assert not live & titles(sample.run(streaming=False))
    assert not timed & titles(sample.run(bare=True))


def test_what_is_missing_leaves_no_hole() -> None:
    bare = sample.run(bare=True)
    page = Page(render(bare))
    assert "What both sides counted" not in page.headings
    assert not {"Goodput", "Efficiency", "Objective", "Memory, MiB"} & {
        cell for table in page.tables for cell in table[0]
    }
    nothing = bare.model_copy(update={"stages": []})
    assert Page(render(nothing)).tables == []


def test_both_sides_tokens_are_compared(full: Run, page: Page) -> None:
    assert page.row("Server’s tokens", "single")[1:4] == [
        figure(full.tokens[0].client),
        figure(full.tokens[0].server),
        "✓ none",
    ]
    assert page.row("Server’s tokens", "batch-profile")[3] == "✗ +7"


def test_the_page_loads_nothing(page: Page, full: Run) -> None:
    assert [load for load in page.loads if not load.startswith("#")] == ["data:,"]
    html = render(full)
    assert not {"script", "iframe", "object", "embed", "img", "image", "use", "base"} & page.tags
    assert re.findall(r"url\(|@import|https?://(?!localhost:8000)", html) == []


def test_strangers_texts_stay_texts() -> None:
    options: dict[str, Any] = {**FULL, "errors": False, "client_limited": True}
    plain, hostile = Page(render(sample.run(**options))), Page(render(sample.run(**options, hostile=True)))
    assert hostile.unclosed == []
    assert hostile.tags <= plain.tags | {"rect"}
    assert hostile.attributes <= plain.attributes
    assert [load for load in hostile.loads if not load.startswith("#")] == ["data:,"]
    assert hostile.drawings()
    html = render(sample.run(**options, hostile=True))
    assert "<script" not in html
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)


def test_a_long_text_does_not_make_a_long_page() -> None:
    run = sample.run()
    long = run.model_copy(update={"command": ["x" * 3_000_000], "settings": {"prompt": "y" * 3_000_000}})
    assert len(render(long)) < len(render(run)) + 10_000


def test_ten_thousand_requests_are_a_megabyte_and_three_seconds_at_most() -> None:
    run = sample.run(scenarios=("concurrency",), open_loop=True, requests=1000)
    assert sum(stage.requests for stage in run.stages) == 10_000
    started = time.process_time()
    html = render(run)
    assert time.process_time() - started <= 3
    assert len(html.encode()) <= 1_000_000


def test_many_levels_share_a_chart_sparingly() -> None:
    run = sample.run(scenarios=("concurrency",))
    rows = [run.stages[0].model_copy(update={"name": f"level {n}"}) for n in range(30)]
    html = render(run.model_copy(update={"stages": rows}))
    assert "8 of 30 levels." in html


def test_hours_have_as_many_points_as_a_chart_can_show() -> None:
    stage = sample.run(scenarios=("streaming",)).stages[0]
    hours = [stage.timeline[0].model_copy(update={"at_s": float(second)}) for second in range(7200)]
    run = sample.run(scenarios=("streaming",))
    html = render(run.model_copy(update={"stages": [stage.model_copy(update={"timeline": hours})]}))
    (drawing,) = [svg for svg in Page(html).drawings() if svg.findtext("title") == "Throughput over time"]
    (line,) = [path.get("d", "") for path in drawing.iter("path") if (path.get("class") or "").startswith("line")]
    assert 100 <= line.count("L") + line.count("M") <= 200


def written(run: Run, folder: Path) -> Path:
    path = folder / "results.json"
    path.write_text(run.model_dump_json())
    return path


def test_the_command_writes_the_page_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written(sample.run(), tmp_path))]) == Exit.OK
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(sample.run())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


@pytest.mark.parametrize(("format", "begins"), [("md", "Model: "), ("csv", "started_at,"), ("junit", "<?xml ")])
def test_the_command_prints_other_formats(
    format: str, begins: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(written(sample.run(), tmp_path))
    assert main([run, "--format", format]) == Exit.OK
    said = capsys.readouterr().out
    assert said.startswith(begins)
    output = tmp_path / "out"
    assert main([run, "--format", format, "--output", str(output)]) == Exit.OK
    assert output.read_text() == said


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(sample.run(), tmp_path)
    assert main([str(tmp_path / "none.json")]) == Exit.USAGE
    assert "none.json: No such file or directory" in capsys.readouterr().err
    assert main([str(run), "--output", str(tmp_path / "none" / "report.html")]) == Exit.USAGE
    assert "none/report.html: No such file or directory" in capsys.readouterr().err
    written(sample.run(slo=None).model_copy(update={"slo": "fast"}), tmp_path)
    assert main([str(run)]) == Exit.USAGE
    assert "'fast' is no objective" in capsys.readouterr().err
    run.write_text("{}")
    assert main([str(run)]) == Exit.USAGE
    assert "schema_version" in capsys.readouterr().err
    with pytest.raises(ResultsError):
        Run.read(run)


@pytest.mark.parametrize(("asked", "code"), [(["--help"], 0), ([], 2), (["x.json", "--format", "pdf"], 2)])
def test_the_command_explains_itself(asked: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == code
    said = capsys.readouterr()
    assert "python -m perf.report" in said.out + said.err
