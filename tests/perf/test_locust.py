"""The locustfile in Locust's own process, against a server that records its requests and its times.

All runs without the web UI start in a fixture, four at a time: most of their time is start-up and waiting.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

pytestmark = [pytest.mark.perf, pytest.mark.ci]

LOCUSTFILE = Path(__file__).parents[2] / "perf/locustfile.py"
FIRST_S, GAP_S, TOKENS = 0.05, 0.01, 8
KINDS = ("POST", "TTFT", "TPOT", "tokens")

Json = dict[str, Any]


@dataclass
class RecordingServer:
    """Sends TOKENS tokens, the first after FIRST_S; the prompts `busy`, `broken` and `cut` cause failures.

    `ttft_ms` and `tpot_ms` are the actual times, which are longer than intended on a busy machine.
    """

    url: str = ""
    bodies: list[Json] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    active: int = 0
    active_counts: list[tuple[float, int]] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [body["inputs"] if "inputs" in body else body["prompt"] for body in self.bodies]

    async def respond(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.urls.append(str(request.rel_url))
        self.arrived.append(time.monotonic())
        self.keys.append(request.headers.get("Authorization"))
        if self.prompts[-1] == "busy":
            return web.json_response({"error": {"code": "overloaded"}}, status=429, headers={"Retry-After": "1"})
        self.active += 1
        self.active_counts.append((time.monotonic(), self.active))
        try:
            return await self._stream(request, body, self.prompts[-1])
        finally:
            self.active -= 1

    async def _stream(self, request: web.Request, body: Json, prompt: str) -> web.StreamResponse:
        start, sent = time.monotonic(), list[float]()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": queued\n\n")
        await asyncio.sleep(FIRST_S)
        api = "openai" if request.path.startswith("/v1") else "tgi" if "inputs" in body else "native"
        for number in range(TOKENS):
            if number == 2 and prompt == "broken":
                await response.write(BROKEN[api])
                return response
            if number == 2 and prompt == "cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(EVENTS[api](number))
            sent.append(time.monotonic())
            await asyncio.sleep(GAP_S)
        self.ttft_ms.append((sent[0] - start) * 1e3)
        self.tpot_ms.append((sent[-1] - sent[0]) / (TOKENS - 1) * 1e3)
        if api == "openai":
            await response.write(event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n")
        return response


USAGE = {"prompt_tokens": 1, "completion_tokens": TOKENS}


def event(document: Json) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def native(number: int) -> bytes:
    last = number == TOKENS - 1
    return event({"token": " a", "finished": last, "metrics": {}} | ({"usage": USAGE} if last else {}))


def openai(number: int) -> bytes:
    return event({"choices": [{"index": 0, "text": " a"}], "usage": None})


def tgi(number: int) -> bytes:
    last = number == TOKENS - 1
    end = {"generated_text": " a" * TOKENS, "details": {"generated_tokens": TOKENS}} if last else {}
    return event({"token": {"id": 1, "text": " a"}, "generated_text": None, "details": None} | end)


EVENTS: dict[str, Callable[[int], bytes]] = {"native": native, "openai": openai, "tgi": tgi}
BROKEN = {
    "native": b"event: error\n" + event({"error": {"code": "internal", "message": "no"}, "finished": True}),
    "openai": event({"error": {"message": "no", "type": "server_error", "code": "internal"}}) + b"data: [DONE]\n\n",
    "tgi": event({"error": "no", "error_type": "generation"}),
}


async def serve(server: RecordingServer, ready: threading.Event, stop: asyncio.Event) -> None:
    app = web.Application()
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = server.respond
    app.add_routes([web.post("/generate_stream", handler), web.post("/v1/completions", handler)])
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    ready.set()
    await stop.wait()
    await runner.cleanup()


@contextmanager
def recording_server() -> Iterator[RecordingServer]:
    server, ready, stop = RecordingServer(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(server, ready, stop),))
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def command(url: str, *options: str) -> list[str]:
    # Users complete their requests at the end; otherwise the server would count requests that Locust does not.
    common = ["--host", url, "--stop-timeout", "5"]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *common, *options]


@dataclass
class LocustRun:
    server: RecordingServer
    returncode: int
    output: str
    stats: dict[str, Json]  # by request type, if Locust wrote them in place of its printed report

    @property
    def failures(self) -> dict[str, int]:
        """Counts by kind, from the printed report."""
        printed = re.findall(r"^(\d+) +POST /\S+: (.+?) *$", self.output, re.MULTILINE)
        return {kind: int(count) for count, kind in printed}


def run_locust(stats_file: Path | None, *options: str) -> LocustRun:
    with recording_server() as server:
        json_file = ["--json-file", str(stats_file.with_suffix(""))] if stats_file is not None else []
        line = command(server.url, "--headless", "--only-summary", *json_file, *options)
        done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    document = json.loads(stats_file.read_text()) if stats_file is not None else []
    stats = {row["method"]: row for row in document}
    return LocustRun(server, done.returncode, done.stdout + done.stderr, stats)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


RUNS: dict[str, list[str]] = {
    "steps": ["--step-users", "2", "--step-seconds", "3", "--steps", "3"],
    **{
        api: ["-u", "12", "-r", "12", "-t", "3s", "--api", api, "--model", "m", "--max-tokens", "8"]
        for api in ("native", "openai", "tgi")
    },
    "busy": ["-u", "1", "-t", "3s", "--prompt", "busy"],
    **{f"broken {api}": ["-u", "1", "-t", "2s", "--api", api, "--prompt", "broken"] for api in BROKEN},
    "cut": ["-u", "1", "-t", "2s", "--prompt", "cut"],
    "unreachable": ["-u", "1", "-t", "2s", "--host", f"http://127.0.0.1:{free_port()}"],
    "key": ["-u", "1", "-t", "2s", "--ignore-eos"],
    "seed": ["-u", "1", "-t", "2s", "--prompt-words", "3"],
    "same seed": ["-u", "1", "-t", "2s", "--prompt-words", "3"],
    "invalid steps": ["--step-users", "-1"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocustRun]:
    key = tmp_path_factory.mktemp("keys") / "key"
    key.write_text("secret\n")
    folder = tmp_path_factory.mktemp("stats")
    files: dict[str, Path | None] = {name: folder / f"{name}.json" if name in BROKEN else None for name in RUNS}
    options = {**RUNS, "key": [*RUNS["key"], "--api-key-file", str(key)]}
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(RUNS, pool.map(lambda name: run_locust(files[name], *options[name]), RUNS), strict=True))


def median(row: Json) -> float:
    """In ms; Locust rounds to whole ms."""
    return statistics.median(int(ms) for ms, count in row["response_times"].items() for _ in range(count))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "invalid steps"])
def test_locust_ends_without_an_exception(runs: dict[str, LocustRun], name: str) -> None:
    assert runs[name].returncode in (0, 1), runs[name].output  # 1: requests failed
    assert "Traceback" not in runs[name].output


@pytest.mark.parametrize("api", ["native", "openai", "tgi"])
def test_requests_ttft_tpot_and_tokens_are_counted_exactly(runs: dict[str, LocustRun], api: str) -> None:
    server, stats = runs[api].server, runs[api].stats

    count = len(server.bodies)
    assert count >= 100
    assert {kind: row["num_requests"] for kind, row in stats.items()} == dict.fromkeys(KINDS, count)
    assert sum(row["num_failures"] for row in stats.values()) == 0
    assert stats["tokens"]["total_response_time"] == TOKENS * count
    # The minimum of more than 100 is exact also on a busy machine; what the client adds to every request is part of it.
    assert min(server.ttft_ms) <= stats["TTFT"]["min_response_time"] <= min(server.ttft_ms) + 3
    assert median(stats["TTFT"]) == pytest.approx(statistics.median(server.ttft_ms), abs=15)
    assert median(stats["TPOT"]) == pytest.approx(statistics.median(server.tpot_ms), abs=2)
    assert stats["POST"]["min_response_time"] >= 1e3 * (FIRST_S + (TOKENS - 1) * GAP_S)
    assert len({tuple(prompt.split()[:5]) for prompt in server.prompts}) == count
    assert server.bodies[0].get("model") == (None if api == "tgi" else "m")
    assert ("?model=m" in server.urls[0]) == (api == "tgi")


def test_prompts_depend_on_the_seed_alone(runs: dict[str, LocustRun]) -> None:
    first, again = runs["seed"].server.prompts, runs["same seed"].server.prompts

    shared = min(len(first), len(again))
    assert shared >= 3
    assert again[:shared] == first[:shared]
    assert len(first[0].split()) == 3


@pytest.mark.parametrize(
    ("api", "kind"), [("native", "in band internal"), ("openai", "in band internal"), ("tgi", "in band generation")]
)
def test_error_in_band_is_a_failure_without_ttft(runs: dict[str, LocustRun], api: str, kind: str) -> None:
    run = runs[f"broken {api}"]

    assert run.failures == {kind: len(run.server.bodies)}
    assert "TTFT" not in run.output
    assert "tokens" not in run.output


def test_stream_that_is_cut_short_is_a_failure(runs: dict[str, LocustRun]) -> None:
    failures = runs["cut"].failures

    assert all(kind.startswith("cut short") for kind in failures)
    assert sum(failures.values()) == len(runs["cut"].server.bodies) > 0


def test_retry_after_is_honoured(runs: dict[str, LocustRun]) -> None:
    server = runs["busy"].server

    assert runs["busy"].failures == {"http 429": len(server.bodies)}
    gaps = [later - earlier for earlier, later in zip(server.arrived, server.arrived[1:], strict=False)]
    assert gaps
    assert min(gaps) >= 0.99


def test_unreachable_server_is_a_failure(runs: dict[str, LocustRun]) -> None:
    failures = runs["unreachable"].failures

    assert sum(failures.values()) > 0
    assert all("refused" in kind for kind in failures)


def test_api_key_and_ignore_eos_are_sent(runs: dict[str, LocustRun]) -> None:
    server = runs["key"].server

    assert set(server.keys) == {"Bearer secret"}
    assert server.bodies[0]["ignore_eos"] is True


def test_steps_add_users(runs: dict[str, LocustRun]) -> None:
    server = runs["steps"].server

    start = server.arrived[0]
    reached = [max(n for at, n in server.active_counts if low <= at - start < low + 1.4) for low in (1.5, 4.5, 7.5)]
    assert reached == [2, 4, 6]


def test_invalid_steps_are_rejected(runs: dict[str, LocustRun]) -> None:
    assert runs["invalid steps"].returncode != 0
    assert "--step-users, --step-seconds and --steps must be 1 or more" in runs["invalid steps"].output


def test_help_lists_the_options() -> None:
    line = [sys.executable, "-m", "perf.locustfile"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=LOCUSTFILE.parents[1], check=True)

    for option in ("--api", "--prompt", "--max-tokens", "--step-users", "--api-key-file"):
        assert re.search(rf"^  {option} .*", done.stdout, re.MULTILINE)


def fetch(url: str, form: Json | None = None) -> str:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(url, data, timeout=5) as response:
        text: str = response.read().decode()
        return text


def wait_until(met: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if met():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_web_ui_starts_a_run_with_its_form() -> None:
    port = free_port()
    ui = f"http://127.0.0.1:{port}"
    with recording_server() as server:
        line = command(server.url, "--web-host", "127.0.0.1", "--web-port", str(port))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: "max_tokens" in fetch(ui))
            started = json.loads(fetch(f"{ui}/swarm", {"user_count": 1, "spawn_rate": 1, "api": "openai"}))
            assert started["success"]
            wait_until(lambda: '"TTFT"' in fetch(f"{ui}/stats/requests"))
            fetch(f"{ui}/stop", {})
        finally:
            process.terminate()
            process.wait(20)
    assert server.bodies[0]["stream"] is True
