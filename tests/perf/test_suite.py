"""The whole suite as a command, against golden servers."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from perf.results import SCHEMA_FILE, Run, schema

from .golden import golden

pytestmark = pytest.mark.perf


def suite(folder: Path, url: str, line: str = "") -> tuple[int, Run | None, subprocess.CompletedProcess[str]]:
    command = [sys.executable, "-m", "perf.suite", "--url", url, *shlex.split(line), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    path = folder / "results.json"
    return done.returncode, Run.read(path) if path.exists() else None, done


def made(folder: Path, url: str, line: str) -> Run:
    code, run, done = suite(folder, url, line)
    assert run is not None, done.stderr
    assert code == run.verdict.exit_code, done.stderr
    jsonschema.validate(json.loads((folder / "results.json").read_text()), json.loads(SCHEMA_FILE.read_text()))
    return run


def test_the_schema_on_disk_is_that_of_the_types() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == schema(), "write it anew: python -c 'from perf.results import ...'"


def test_a_quick_run_finds_what_is_known(tmp_path: Path) -> None:
    with golden("--ttft-ms", "30", "--itl-ms", "5", "--slots", "16") as url:
        run = made(tmp_path, url, "--quick --max-tokens 8 --slo 'ttft_p95<1s'")
    assert run.verdict.exit_code == 0, run.verdict
    assert {stage.scenario for stage in run.stages} == {"single", "batch", "streaming", "concurrency"}
    assert all(one.difference == 0 and one.client == one.server and one.client for one in run.tokens)
    assert all(one.client_requests == one.server_requests for one in run.tokens if one.scenario != "batch")
    single, streaming = run.stage("single", "one at a time"), run.stage("streaming", "one at a time")
    assert single is not None
    assert streaming is not None
    assert single.e2e_ms is not None
    assert single.ttft_ms is None
    assert 65 <= single.e2e_ms.p50 <= 69
    assert streaming.ttft_ms is not None
    assert streaming.tpot_ms is not None
    assert 30 <= streaming.ttft_ms.p50 <= 32
    assert abs(streaming.tpot_ms.p50 - 5) < 0.5
    wide = run.stage("concurrency", "16 streams")
    assert wide is not None
    assert wide.efficiency == pytest.approx(1, abs=0.1)
    batch = run.stage("batch", "8 prompts")
    assert batch is not None
    assert batch.efficiency == pytest.approx(8, rel=0.1)
    assert any("More streams still pay" in advice for advice in run.verdict.recommendations)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "results.json",
        "report.html",
        "report.md",
        "results.csv",
        "junit.xml",
    }


def test_a_queue_is_named_as_the_limit(tmp_path: Path) -> None:
    with golden("--ttft-ms", "30", "--itl-ms", "5", "--slots", "4") as url:
        run = made(tmp_path, url, "--only concurrency --concurrency 1 4 16 --max-tokens 8")
    assert any(sentence.startswith("The queue was the limit") for sentence in run.verdict.sentences), run.verdict


@pytest.mark.timeout(300)
@pytest.mark.parametrize("of", ["rate", "closed"])
def test_the_highest_load_is_found(of: str, tmp_path: Path) -> None:
    """40 slots of 410 ms: 97.6 requests a second; or 40 streams, and up to 42, since a p95 lets a twentieth wait."""
    arrival = "constant" if of == "rate" else "closed"
    with golden("--ttft-ms", "60", "--itl-ms", "50", "--slots", "40") as url:
        line = f"--only find-max --arrival {arrival} --slo 'ttft_p95<90ms' --max-tokens 8 --duration 3s"
        run = made(tmp_path, url, line)
    found = run.find_max
    assert found is not None
    assert found.best == pytest.approx(97.56 if of == "rate" else 41, rel=0.05)
    assert len(found.probes) <= 12
    assert run.verdict.exit_code == 0
    assert any("It carries" in sentence for sentence in run.verdict.sentences)


def test_failures_fail_the_run_and_are_counted_by_kind(tmp_path: Path) -> None:
    with golden("--errors", "429:0.2,in-band:0.2", "--ttft-ms", "5", "--itl-ms", "1") as url:
        run = made(tmp_path, url, "--only concurrency --concurrency 8 --num-requests 100")
    assert run.verdict.exit_code == 1
    (stage,) = run.stages
    assert set(stage.errors) == {"http 429", "in band internal"}
    assert stage.finished + sum(stage.errors.values()) == stage.requests
    assert "requests failed: " in run.verdict.reasons[0]


def test_a_missed_objective_fails_the_run(tmp_path: Path) -> None:
    with golden("--ttft-ms", "80") as url:
        run = made(tmp_path, url, "--only streaming --slo 'ttft_p95<50ms' --num-requests 5")
    assert run.verdict.exit_code == 1
    (stage,) = run.stages
    assert stage.goodput is not None
    assert stage.goodput.share == 0
    assert "ttft_p95 is 8" in run.verdict.reasons[0]


def test_a_client_that_cannot_keep_up_says_so(tmp_path: Path) -> None:
    with golden("--ttft-ms", "1", "--itl-ms", "1") as url:
        line = "--only rate --rate 20000 --arrival constant --max-tokens 2 --duration 0.2s --warmup 10"
        code, run, done = suite(tmp_path, url, line)
    assert code == 4, done.stderr
    assert run is not None
    assert run.verdict.sentences[0].startswith("CLIENT-LIMITED")
    assert "perf.calibrate" in run.verdict.recommendations[0]


def test_a_burst_is_no_rate_of_its_own(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        line = "--only rate --rate 40 --arrival burst --burst-size 20 --duration 2s --max-tokens 2 --warmup 20"
        run = made(tmp_path, url, line)
    (stage,) = run.stages
    assert stage.client.achieved_rate == pytest.approx(1, abs=0.02)


def test_a_window_without_a_request_is_no_success(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        run = made(tmp_path, url, "--only rate --rate 0.9 --arrival constant --warmup 1 --duration 0.1s --max-tokens 2")
    assert run.verdict.exit_code == 1
    assert "no request was due in its window" in run.verdict.reasons[0]


def test_a_run_survives_a_server_that_is_restarted(tmp_path: Path) -> None:
    """In the second scenario, when it had counted much; after that it is slow, and counts little."""
    with ExitStack() as first:
        url = first.enter_context(golden("--ttft-ms", "10", "--itl-ms", "1"))
        command = [sys.executable, "-m", "perf.suite", "--url", url, "--only", "single,concurrency"]
        line = ["--concurrency", "2", "--duration", "3s", "--max-tokens", "4", "--output", str(tmp_path)]
        with subprocess.Popen([*command, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any("answers" in said for said in process.stderr), "the first scenario has ended"
            time.sleep(1.5)
            first.close()
            with golden("--port", url.rpartition(":")[2], "--ttft-ms", "500"):
                process.communicate(timeout=60)
    run = Run.read(tmp_path / "results.json")
    assert process.returncode == run.verdict.exit_code == 1, "requests failed meanwhile"
    single, concurrency = run.tokens
    assert single.difference == 0
    assert concurrency.server is None
    assert concurrency.client > 0


def test_an_open_loop_is_told_apart(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        run = made(tmp_path, url, "--only streaming,rate --rate 20 40 --duration 2s --max-tokens 4")
    assert [(stage.load.loop, stage.load.rate) for stage in run.stages] == [
        ("closed", None),
        ("open", 20),
        ("open", 40),
    ]
    for stage in run.stages[1:]:
        assert stage.load.rate is not None
        assert stage.requests_per_s == pytest.approx(stage.load.rate, rel=0.35)
        assert stage.client.achieved_rate == pytest.approx(1, abs=0.02)


def test_a_trace_is_played_as_it_was(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": at, "input_length": 5 + at // 500, "output_length": 2 + at // 500} for at in range(0, 2000, 100)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        run = made(tmp_path / "out", url, f"--only rate --trace {trace}")
    (stage,) = run.stages
    assert stage.client.schedule_delay_p50_ms < 10
    assert stage.samples.ttft_ms[0] is not None
    assert stage.samples.ttft_ms[0] < 60, "nobody waits for the client to begin"
    assert stage.requests == 20
    assert stage.samples.due_s == pytest.approx([at / 1e3 for at in range(0, 2000, 100)], abs=0.05)
    assert stage.tokens == sum(line["output_length"] for line in lines)
    assert stage.prompt_tokens == sum(line["input_length"] for line in lines)


@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_other_apis_are_measured_alike(api: str, tmp_path: Path) -> None:
    with golden("--ttft-ms", "20", "--itl-ms", "2") as url:
        run = made(tmp_path, url, f"--api {api} --quick --max-tokens 8")
    assert run.verdict.exit_code == 0
    assert run.target.fixed_length == (api == "openai")
    assert ("batch" in run.skipped) == (api == "tgi")
    assert all(one.difference == 0 for one in run.tokens)


def test_a_repeat_is_a_run_of_its_own(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        run = made(tmp_path, url, "--only concurrency --concurrency 2 4 --repeats 3 --num-requests 8 --max-tokens 4")
    for stage in run.stages:
        assert stage.repeats == 3
        assert set(stage.samples.repeat) == {0, 1, 2}
        assert stage.requests == 24


def test_results_on_standard_output_are_nothing_but_results(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        _, run, done = suite(tmp_path, url, "--only single --num-requests 3 --json")
    told: dict[str, Any] = json.loads(done.stdout)
    assert run is not None
    assert told == run.model_dump(mode="json")


def test_results_may_have_a_name_of_their_own(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        made_of = [
            sys.executable,
            "-m",
            "perf.suite",
            "--url",
            url,
            "--only",
            "single",
            "--num-requests",
            "3",
            "--output",
        ]
        path = tmp_path / "baseline_cpu.json"
        subprocess.run([*made_of, str(path)], check=True, capture_output=True, timeout=60)
        (tmp_path / "file").write_text("")
        nowhere = subprocess.run([*made_of, str(tmp_path / "file" / "x")], capture_output=True, text=True, timeout=60)
    assert {one.suffix for one in tmp_path.glob("baseline_cpu.*")} == {".json", ".html", ".md", ".csv", ".xml"}
    assert Run.read(path).stage("single", "one at a time") is not None
    assert nowhere.returncode == 2
    assert "Not a directory" in nowhere.stderr
    assert "one at a time" not in nowhere.stderr, "it is said before an hour of measuring, not after"


def test_who_stops_it_is_told_what_became_of_it(tmp_path: Path) -> None:
    with golden("--ttft-ms", "10", "--itl-ms", "1") as url:
        command = [
            sys.executable,
            "-m",
            "perf.suite",
            "--url",
            url,
            "--num-requests",
            "10000",
            "--output",
            str(tmp_path),
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert "mock" in process.stderr.readline()
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
            assert process.stderr.read().endswith("stopped; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_nobody_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    code, run, done = suite(tmp_path, "http://127.0.0.1:9")
    assert (code, run) == (3, None)
    assert "make serve" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_of_another_api_is_told_so(tmp_path: Path) -> None:
    with golden("--errors", "500:1") as url:
        code, _, done = suite(tmp_path, url)
    assert code == 3
    assert "http 500" in done.stderr
    assert "as planned" in done.stderr


def test_a_baseline_gates_as_compare_does(tmp_path: Path) -> None:
    """Twice the TTFT fails; nothing in common is no success; a stage that measured its client is not trusted."""
    line = "--only streaming --num-requests 30 --max-tokens 4"
    with golden("--ttft-ms", "20", "--itl-ms", "1") as url:
        made(tmp_path / "a", url, line)
        same = made(tmp_path / "b", url, f"{line} --baseline {tmp_path / 'a' / 'results.json'} --fail-on 50%")
        other = made(tmp_path / "c", url, f"--only single --baseline {tmp_path / 'a' / 'results.json'}")
    with golden("--ttft-ms", "40", "--itl-ms", "1") as url:
        slower = made(tmp_path / "d", url, f"{line} --baseline {tmp_path / 'a' / 'results.json'}")
    assert same.verdict.exit_code == 0
    assert any("--repeats 5" in sentence for sentence in same.verdict.sentences)
    assert other.verdict.exit_code == 2
    assert "no stage is in both runs" in other.verdict.reasons[0]
    assert slower.verdict.exit_code == 1
    assert slower.verdict.reasons[0].startswith("worse than the baseline: streaming, one at a time: ttft 2")


def test_every_run_asks_what_nobody_has_asked_before(tmp_path: Path) -> None:
    with golden("--ttft-ms", "5", "--itl-ms", "1") as url:
        first, second = (made(tmp_path / name, url, "--only single --num-requests 3") for name in "ab")
    assert first.settings["salt"] != second.settings["salt"]
    assert first.settings["seed"] == second.settings["seed"]
