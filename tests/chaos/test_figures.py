"""What the figures of a run say: limits, tables and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.chaos import census, figures
from tests.chaos.census import Process
from tests.chaos.figures import Check, Fault, Figures
from tests.chaos.load import Outcome, Stream, judged
from tests.graph.streams import Json, toy_calls

SECONDS, WARM_S = 1200.0, 240.0


def process(name: str, mb_per_min: float = 0.0, descriptors_per_min: float = 0.0) -> Process:
    """20 minutes of one sample every 2 s: 100 MB are allocated in the first 4 minutes, and `mb_per_min` throughout."""
    times = [2.0 * n for n in range(600)]
    rss = [100 + min(at, 240) / 2.4 + at / 60 * mb_per_min for at in times]
    descriptors = [20 + n % 3 + int(at / 60 * descriptors_per_min) for n, at in enumerate(times)]
    return Process(name, times, rss, descriptors, [8] * 600)


def outcomes(first_ms: float, last_ms: float) -> list[Outcome]:
    """One request per second whose time to first token goes from one value to the other."""
    ttfts = [(first_ms + (last_ms - first_ms) * n / 1200) / 1e3 for n in range(1200)]
    return [Outcome("x", "answered", 1000 + n, 1001 + n, ttft, 0.1) for n, ttft in enumerate(ttfts)]


def test_memory_is_judged_after_the_warm_up() -> None:
    calm, leaking = figures.of_processes([process("calm"), process("leaking", 0.6)], SECONDS, WARM_S)[::3]
    assert (calm.held, leaking.held) == (True, False)
    assert calm.value == pytest.approx(0, abs=1e-6)
    assert leaking.value == pytest.approx(0.6)


def test_descriptors_that_come_and_go_are_no_leak() -> None:
    for per_min, held in ((0, True), (1, False)):
        _, descriptors, threads = figures.of_processes([process("x", 0, per_min)], SECONDS, WARM_S)
        assert (descriptors.held, threads.held) == (held, True)


def test_a_process_that_ended_early_or_began_late_is_not_judged() -> None:
    short, late = process("x"), process("y")
    short.times = [at / 2 for at in short.times]
    late.times = [at + 300 for at in late.times]
    assert figures.of_processes([short, late], SECONDS, WARM_S) == []


def test_a_short_run_shows_memory_and_does_not_judge_it() -> None:
    memory, *_ = figures.of_processes([process("leaking", 5)], SECONDS, SECONDS - 60)
    assert memory.value == pytest.approx(5, abs=0.2)
    assert memory.held


@pytest.mark.parametrize(("last_ms", "held"), [(20, True), (20.8, True), (24, False), (10, True)])
def test_drift_compares_the_first_third_with_the_last(last_ms: float, held: bool) -> None:
    found = figures.drift(outcomes(20, last_ms), 1000, SECONDS, WARM_S)
    assert found is not None
    assert found.held is held


def test_the_files_have_all_values_and_the_curves(tmp_path: Path) -> None:
    fault = Fault("kill <it>", 5, 6, 9.5, True, 40, 3, 0.7, ("a", "b"))
    checks = [Check("memory of x", 0.7, 0.5, "MB/min"), Check("drift", 0.01, 0.05, "ratio")]
    found = Figures(
        "chaos", 7, SECONDS, WARM_S, {"answered": 1200}, [fault], checks, outcomes(20, 21), [process("Ingress")], 1000
    )
    assert not found.held
    text = found.text()
    assert "MISSED" in text
    assert "kill <it>" in text
    assert "4.5" in text, "seconds until the recovery"
    found.write(tmp_path)
    document = json.loads((tmp_path / "figures.json").read_text())
    assert (document["held"], document["faults"][0]["lost"], len(document["checks"])) == (False, 3, 2)
    rows = read(tmp_path / "processes.csv")
    assert len(rows) == 600
    assert rows[0] == {"process": "Ingress", "seconds": "0.0", "rss_mb": "100.0", "descriptors": "20", "threads": "8"}
    assert len(read(tmp_path / "requests.csv")) == 1200
    html = (tmp_path / "report.html").read_text()
    assert "kill &lt;it&gt;" in html
    charts = html.split("</pre>")[1].removesuffix("</body>")
    assert [one.tag.rpartition("}")[2] for one in ET.fromstring(f"<x>{charts}</x>")] == ["h2", "svg"] * 5


def read(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def events(path: str, *found: Json, dones: int = 0) -> Stream:
    (call,) = [one for one in toy_calls(6) if one.path == path]
    return Stream(call, events=list(found), dones=dones)


def test_a_stream_ends_once_with_its_end_or_with_one_error() -> None:
    token: Json = {"choices": [{"index": 0, "text": "ab", "finish_reason": "length"}]}
    answer = ({0: "ab"}, {0: "length"})
    path = "/v1/completions"
    assert judged(events(path, token, dones=1), answer)[0] == "answered"
    assert judged(events(path, token, dones=1), ({0: "xy"}, {0: "length"}))[0] == "wrong"
    assert judged(events(path, token), answer) == ("wrong", "0 ends")
    assert judged(events(path, token, dones=2), answer) == ("wrong", "2 ends")
    assert judged(events(path, token, {"error": {"code": "x"}}, dones=1), answer)[0] == "failed"
    assert judged(events(path, {"error": {}}, {"error": {"code": "x"}}, {"error": {"code": "x"}}), answer)[0] == "wrong"
    assert (
        judged(events("/v1/messages", {"type": "message_stop"}, {"type": "error", "error": {}}), answer)[0] == "wrong"
    )


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["ray::SERVE_REPLICA::serve_app#Ingress#52pq"], "Ingress"),
        (["ray::SERVE_REPLICA::serve_app#model-toy#q8mq:ServeReplica:serve_app:model-toy.__init__"], "model-toy"),
        (["ray::ServeReplica:serve_app:Ingress"], "Ingress"),
        (["ray::ServeController.listen_for_change"], "ray::ServeController"),
        (["/x/python", "-u", "/x/ray/dashboard/agent.py", "--a"], "agent.py"),
        (["/x/python", "-m", "serve_app", "--config", "x"], "serve_app"),
        (["/x/raylet", "--b"], "raylet"),
        ([], None),
    ],
)
def test_a_process_is_named_by_what_it_does(command: list[str], name: str | None) -> None:
    assert census.name_of(command) == name
