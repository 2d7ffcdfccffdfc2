"""The suite's command against mock servers."""

from __future__ import annotations

import gc
import io
import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from perf.mock import mock_server
from perf.results import SCHEMA_FILE, Run, schema
from perf.suite import main
from tests.perf.mock_host import MockHost

# Tests whose results depend on times.
measures = pytest.mark.perf
pytestmark = pytest.mark.slow


@dataclass
class Outcome:
    code: int
    run: Run | None
    stdout: str
    stderr: str


def suite(folder: Path, url: str, line: str = "") -> Outcome:
    """The command in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        code = main(["--url", url, *shlex.split(line), "--output", str(folder)])
    path = folder / "results.json"
    return Outcome(code, Run.read(path) if path.exists() else None, out.getvalue(), errors.getvalue())


def measured(folder: Path, url: str, line: str) -> Run:
    outcome = suite(folder, url, line)
    assert outcome.run is not None, outcome.stderr
    assert outcome.code == outcome.run.verdict.exit_code, outcome.stderr
    jsonschema.validate(json.loads((folder / "results.json").read_text()), json.loads(SCHEMA_FILE.read_text()))
    return outcome.run


def command(url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "perf.suite", "--url", url, *options]


def other_clients_ms(url: str, path: str, max_tokens: int) -> float:
    """The time to the first line of an answer, which of a whole answer is the only one.

    The shortest of 20 measurements by urllib: the mock server's own time, with what this machine adds now.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = json.dumps({"prompt": "a", "max_tokens": max_tokens}).encode()
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})

    def measure() -> float:
        began = time.perf_counter()
        with opener.open(request) as answer:
            answer.readline()
            return 1000 * (time.perf_counter() - began)

    return min(measure() for _ in range(20))


def wait_until(met: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_schema_file_matches_the_types() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == schema(), "write perf.results.schema() to results.schema.json"


@measures
@pytest.mark.usefixtures("awake")
def test_quick_run_measures_the_known_times(mock: MockHost, tmp_path: Path) -> None:
    url = mock(ttft_s=0.03, itl_s=0.005, slots=16)
    run = measured(tmp_path, url, "--quick --max-tokens 8 --slo 'ttft_p95<5s'")
    assert run.verdict.exit_code == 0, run.verdict
    assert {stage.scenario for stage in run.stages} == {"single", "batch", "streaming", "concurrency"}
    assert all(count.difference == 0 and count.client == count.server and count.client for count in run.tokens)
    assert all(count.client_requests == count.server_requests for count in run.tokens if count.scenario != "batch")
    single, streaming = run.stage("single", "one at a time"), run.stage("streaming", "one at a time")
    assert single is not None
    assert streaming is not None
    assert single.e2e_ms is not None
    assert single.ttft_ms is None
    assert 65 <= single.e2e_ms.min <= other_clients_ms(url, "/generate", max_tokens=8) + 3
    assert streaming.ttft_ms is not None
    assert streaming.tpot_ms is not None
    assert 30 <= streaming.ttft_ms.min <= other_clients_ms(url, "/generate_stream", max_tokens=2) + 1.5
    assert min(abs(value - 5) for value in streaming.samples.tpot_ms if value is not None) < 0.5
    one, many = run.stage("concurrency", "1 stream"), run.stage("concurrency", "16 streams")
    assert one is not None
    assert many is not None
    assert many.efficiency == pytest.approx(many.tokens_per_s / one.tokens_per_s / 16)
    single_prompt, batch = run.stage("batch", "1 prompt"), run.stage("batch", "8 prompts")
    assert single_prompt is not None
    assert batch is not None
    assert batch.efficiency == pytest.approx(batch.tokens_per_s / single_prompt.tokens_per_s)
    assert batch.tokens_per_s > 4 * single_prompt.tokens_per_s
    assert any("More streams still raise the throughput" in advice for advice in run.verdict.recommendations)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "results.json",
        "report.html",
        "report.md",
        "results.csv",
        "junit.xml",
    }


@measures
def test_queue_is_named_as_the_limit(mock: MockHost, tmp_path: Path) -> None:
    url = mock(ttft_s=0.03, itl_s=0.005, slots=4)
    run = measured(tmp_path, url, "--only concurrency --concurrency 1 4 16 --max-tokens 8 --num-requests 8 --warmup 4")
    assert any(sentence.startswith("The queue was the limit") for sentence in run.verdict.sentences), run.verdict


@measures
def test_search_reports_the_highest_load(mock: MockHost, tmp_path: Path) -> None:
    """Four slots carry four streams. test_search.py checks the precision, also of rates, in virtual time."""
    url = mock(ttft_s=0.02, itl_s=0.01, slots=4)
    line = "--only find-max --slo 'ttft_p95<45ms' --max-tokens 4 --duration 0.5s --num-requests 20 --warmup 4"
    run = measured(tmp_path, url, f"{line} --arrival closed")
    found = run.find_max
    assert found is not None
    assert len(found.probes) <= 12
    assert found.of == "concurrency"
    assert found.best is not None
    assert found.best <= 6
    assert [probe.at for probe in found.probes if probe.met and probe.at == found.best]
    assert run.verdict.exit_code == 0
    assert any("The highest load that meets ttft_p95<45ms is" in sentence for sentence in run.verdict.sentences)


@measures
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("of", ["rate", "concurrency"])
def test_search_finds_the_capacity_in_real_time(mock: MockHost, of: str, tmp_path: Path) -> None:
    """40 slots of 410 ms: 97.6 requests per second; or 40 to 42 streams, since a p95 lets a twentieth wait."""
    arrival = "constant" if of == "rate" else "closed"
    url = mock(ttft_s=0.06, itl_s=0.05, slots=40)
    line = f"--only find-max --arrival {arrival} --slo 'ttft_p95<90ms' --max-tokens 8 --duration 3s"
    found = measured(tmp_path, url, line).find_max
    assert found is not None
    assert found.best == pytest.approx(97.56 if of == "rate" else 41, rel=0.05)
    assert len(found.probes) <= 12


def test_failed_requests_fail_the_run_and_are_counted_by_kind(mock: MockHost, tmp_path: Path) -> None:
    url = mock(errors={"429": 0.2, "in-band": 0.2}, ttft_s=0.005, itl_s=0.001)
    run = measured(tmp_path, url, "--only concurrency --concurrency 8 --num-requests 100 --warmup 16 --max-tokens 8")
    assert run.verdict.exit_code == 1
    (stage,) = run.stages
    assert set(stage.errors) == {"http 429", "in band internal"}
    assert stage.finished + sum(stage.errors.values()) == stage.requests
    assert "requests failed: " in run.verdict.reasons[0]


@measures
def test_missed_objective_fails_the_run(mock: MockHost, tmp_path: Path) -> None:
    line = "--only streaming --slo 'ttft_p95<50ms' --num-requests 5 --max-tokens 2"
    run = measured(tmp_path, mock(ttft_s=0.08), line)
    assert run.verdict.exit_code == 1
    (stage,) = run.stages
    assert stage.goodput is not None
    assert stage.goodput.share == 0
    assert "ttft_p95 is " in run.verdict.reasons[0]


@measures
def test_client_that_cannot_keep_up_is_reported(mock: MockHost, tmp_path: Path) -> None:
    """400 requests in 40 ms: a trace ends with its last request, without a cool-down at this rate."""
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": number / 10, "input_length": 5, "output_length": 2} for number in range(400)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    outcome = suite(tmp_path / "out", mock(ttft_s=0.001, itl_s=0.001), f"--only rate --trace {trace}")
    assert outcome.code == 4, outcome.stderr
    assert outcome.run is not None
    assert outcome.run.verdict.sentences[0].startswith("CLIENT-LIMITED")
    assert "perf.calibrate" in outcome.run.verdict.recommendations[0]


@measures
def test_burst_does_not_lower_the_achieved_rate(mock: MockHost, tmp_path: Path) -> None:
    line = "--only rate --rate 40 --arrival burst --burst-size 20 --duration 2s --max-tokens 2 --warmup 20"
    (stage,) = measured(tmp_path, mock(ttft_s=0.01, itl_s=0.001), line).stages
    assert stage.client.achieved_rate == pytest.approx(1, abs=0.02)


@measures
def test_window_without_a_request_fails_the_run(mock: MockHost, tmp_path: Path) -> None:
    line = "--only rate --rate 0.9 --arrival constant --warmup 1 --duration 0.1s --max-tokens 2"
    run = measured(tmp_path, mock(ttft_s=0.01, itl_s=0.001), line)
    assert run.verdict.exit_code == 1
    assert "no request was due in its window" in run.verdict.reasons[0]


def requests_at(url: str) -> int:
    """Requests that the mock server has counted."""
    with suppress(OSError), urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        text = response.read().decode()
        return int(text.split('requests_total{model="mock"} ')[1].split()[0])
    return 0


def test_run_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    """The restart is in the second scenario, after many tokens; the new server is slow, so its counters stay lower."""
    with ExitStack() as first:
        url = first.enter_context(mock_server("--ttft-ms", "10", "--itl-ms", "1"))
        options = ["--only", "single,concurrency", "--concurrency", "2", "--duration", "2s", "--max-tokens", "4"]
        line = command(url, *options, "--output", str(tmp_path))
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any("requests finished" in text for text in process.stderr), "the first scenario is complete"
            before = requests_at(url)
            wait_until(lambda: requests_at(url) > before + 20)
            first.close()
            with mock_server("--port", url.rpartition(":")[2], "--ttft-ms", "500"):
                process.communicate(timeout=60)
    run = Run.read(tmp_path / "results.json")
    assert process.returncode == run.verdict.exit_code == 1, "requests failed during the restart"
    single, concurrency = run.tokens
    assert single.difference == 0
    assert concurrency.server is None
    assert concurrency.client > 0


@measures
def test_open_loop_has_its_rate_and_loop(mock: MockHost, tmp_path: Path) -> None:
    line = "--only streaming,rate --rate 40 80 --duration 1s --max-tokens 4 --warmup 5"
    run = measured(tmp_path, mock(ttft_s=0.01, itl_s=0.001), line)
    assert [(stage.load.loop, stage.load.rate) for stage in run.stages] == [
        ("closed", None),
        ("open", 40),
        ("open", 80),
    ]
    for stage in run.stages[1:]:
        assert stage.load.rate is not None
        assert stage.requests_per_s == pytest.approx(stage.load.rate, rel=0.35)
        assert stage.client.achieved_rate == pytest.approx(1, abs=0.02)


@measures
def test_trace_is_replayed_at_its_times(mock: MockHost, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    times = range(0, 1000, 50)
    lines = [{"timestamp": at, "input_length": 5 + at // 250, "output_length": 2 + at // 250} for at in times]
    trace.write_text("\n".join(map(json.dumps, lines)))
    run = measured(tmp_path / "out", mock(ttft_s=0.01, itl_s=0.001), f"--only rate --trace {trace}")
    (stage,) = run.stages
    assert stage.client.schedule_delay_p50_ms < 10
    assert stage.samples.ttft_ms[0] is not None
    assert stage.samples.ttft_ms[0] < 60, "the first request is sent when the schedule starts"
    assert stage.requests == 20
    assert stage.samples.due_s == pytest.approx([at / 1e3 for at in times], abs=0.05)
    assert stage.tokens == sum(line["output_length"] for line in lines)
    assert stage.prompt_tokens == sum(line["input_length"] for line in lines)


@measures
@pytest.mark.long
@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_other_apis_run_the_same_scenarios(mock: MockHost, api: str, tmp_path: Path) -> None:
    line = "--concurrency 1 4 --batch-sizes 1 4 --num-requests 4 --warmup 2 --max-tokens 8"
    run = measured(tmp_path, mock(ttft_s=0.02, itl_s=0.002), f"--api {api} {line}")
    assert run.verdict.exit_code == 0
    assert run.target.fixed_length == (api == "openai")
    assert ("batch" in run.skipped) == (api == "tgi")
    assert len(run.tokens) == (4 if api == "openai" else 3)
    assert all(count.difference == 0 for count in run.tokens)


def test_repeats_are_separate_windows(mock: MockHost, tmp_path: Path) -> None:
    line = "--only concurrency --concurrency 2 4 --repeats 3 --num-requests 8 --max-tokens 4"
    for stage in measured(tmp_path, mock(ttft_s=0.01, itl_s=0.001), line).stages:
        assert stage.repeats == 3
        assert set(stage.samples.repeat) == {0, 1, 2}
        assert stage.requests == 24
    assert gc.get_freeze_count() > 0, "the objects that pytest froze stay frozen"


def test_json_on_standard_output_is_the_run_alone(mock: MockHost, tmp_path: Path) -> None:
    outcome = suite(tmp_path, mock(ttft_s=0.01, itl_s=0.001), "--only single --num-requests 3 --json")
    document: dict[str, Any] = json.loads(outcome.stdout)
    assert outcome.run is not None
    assert document == outcome.run.model_dump(mode="json")


def test_output_may_be_a_json_file(mock: MockHost, tmp_path: Path) -> None:
    path = tmp_path / "baseline_cpu.json"
    outcome = suite(path, mock(ttft_s=0.01, itl_s=0.001), "--only single --num-requests 3")
    assert outcome.code == 0
    assert {file.suffix for file in tmp_path.glob("baseline_cpu.*")} == {".json", ".html", ".md", ".csv", ".xml"}
    assert Run.read(path).stage("single", "one at a time") is not None


def test_invalid_output_is_rejected_before_the_measurement(
    mock: MockHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--url", mock(), "--output", str(tmp_path / "file" / "x")])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "Not a directory" in printed.err
    assert "one at a time" not in printed.out + printed.err


def test_interrupted_run_writes_nothing(mock: MockHost, tmp_path: Path) -> None:
    line = command(mock(ttft_s=0.01, itl_s=0.001), "--num-requests", "10000", "--output", str(tmp_path))
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "mock" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read().endswith("interrupted; no results were written\n")
    assert not list(tmp_path.iterdir())


def test_unreachable_server_is_reported_with_a_remedy(tmp_path: Path) -> None:
    outcome = suite(tmp_path, "http://127.0.0.1:9")
    assert (outcome.code, outcome.run) == (3, None)
    assert "make serve" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_server_that_rejects_the_first_request_is_reported(mock: MockHost, tmp_path: Path) -> None:
    outcome = suite(tmp_path, mock(errors={"500": 1.0}))
    assert outcome.code == 3
    assert "http 500" in outcome.stderr
    assert "as configured" in outcome.stderr


@measures
def test_baseline_fails_the_run_as_compare_does(mock: MockHost, tmp_path: Path) -> None:
    """Twice the TTFT fails the run; without a common stage it fails too."""
    line = "--only streaming --num-requests 30 --max-tokens 4 --warmup 4"
    baseline = f"--baseline {tmp_path / 'a' / 'results.json'}"
    url = mock(ttft_s=0.02, itl_s=0.001)
    measured(tmp_path / "a", url, line)
    same = measured(tmp_path / "b", url, f"{line} {baseline} --fail-on 50%")
    other = measured(tmp_path / "c", url, f"--only single --num-requests 3 {baseline}")
    slower = measured(tmp_path / "d", mock(ttft_s=0.04, itl_s=0.001), f"{line} {baseline}")
    assert same.verdict.exit_code == 0
    assert any("--repeats 5" in sentence for sentence in same.verdict.sentences)
    assert other.verdict.exit_code == 2
    assert "no stage is in both runs" in other.verdict.reasons[0]
    assert slower.verdict.exit_code == 1
    assert slower.verdict.reasons[0].startswith("worse than the baseline: streaming, one at a time: ttft 2")


def test_prompts_of_every_run_are_new(mock: MockHost, tmp_path: Path) -> None:
    url = mock(ttft_s=0.005, itl_s=0.001)
    first, second = (measured(tmp_path / name, url, "--only single --num-requests 3") for name in "ab")
    assert first.settings["salt"] != second.settings["salt"]
    assert first.settings["seed"] == second.settings["seed"]
