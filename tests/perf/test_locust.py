"""The real Locust, in a process of its own, against a server whose answers are known."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

pytestmark = pytest.mark.perf

LOCUSTFILE = Path(__file__).parents[2] / "perf/locustfile.py"
FIRST_S, GAP_S, TOKENS = 0.05, 0.01, 8
KINDS = ("POST", "TTFT", "TPOT", "tokens")

Json = dict[str, Any]


@dataclass
class Golden:
    """Answers of TOKENS tokens with the first after FIRST_S; some prompts have a fate of their own.

    `ttft_ms` and `tpot_ms` are what it did in fact, which a busy machine makes more than what it meant to.
    """

    url: str = ""
    bodies: list[Json] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    active: int = 0
    actives: list[tuple[float, int]] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [body["inputs"] if "inputs" in body else body["prompt"] for body in self.bodies]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.arrived.append(time.monotonic())
        self.keys.append(request.headers.get("Authorization"))
        if self.prompts[-1] == "busy":
            return web.json_response({"error": {"code": "overloaded"}}, status=429, headers={"Retry-After": "1"})
        self.active += 1
        self.actives.append((time.monotonic(), self.active))
        try:
            return await self._stream(request, body)
        finally:
            self.active -= 1

    async def _stream(self, request: web.Request, body: Json) -> web.StreamResponse:
        began, sent = time.monotonic(), list[float]()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": queued\n\n")
        await asyncio.sleep(FIRST_S)
        api = "openai" if request.path.startswith("/v1") else "tgi" if "inputs" in body else "native"
        for number in range(TOKENS):
            if number == 2 and self.prompts[-1] == "broken":
                await response.write(BROKEN[api])
                return response
            if number == 2 and self.prompts[-1] == "cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(FRAMES[api](number))
            sent.append(time.monotonic())
            await asyncio.sleep(GAP_S)
        self.ttft_ms.append((sent[0] - began) * 1e3)
        self.tpot_ms.append((sent[-1] - sent[0]) / (TOKENS - 1) * 1e3)
        if api == "openai":
            await response.write(event({"choices": [], "usage": {"completion_tokens": TOKENS}}) + b"data: [DONE]\n\n")
        return response


def event(document: Json) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def native(number: int) -> bytes:
    last = number == TOKENS - 1
    usage = {"usage": {"completion_tokens": TOKENS}} if last else {}
    return event({"token": " a", "finished": last, "metrics": {}} | usage)


def openai(number: int) -> bytes:
    return event({"choices": [{"index": 0, "text": " a"}], "usage": None})


def tgi(number: int) -> bytes:
    last = number == TOKENS - 1
    ending = {"generated_text": " a" * TOKENS, "details": {"generated_tokens": TOKENS}} if last else {}
    return event({"token": {"id": 1, "text": " a"}, "generated_text": None, "details": None} | ending)


FRAMES: dict[str, Callable[[int], bytes]] = {"native": native, "openai": openai, "tgi": tgi}
BROKEN = {
    "native": b"event: error\n" + event({"error": {"code": "internal", "message": "no"}, "finished": True}),
    "openai": event({"error": {"message": "no", "type": "server_error", "code": "internal"}}) + b"data: [DONE]\n\n",
    "tgi": event({"error": "no", "error_type": "generation"}),
}


async def serve(golden: Golden, ready: threading.Event, stop: asyncio.Event) -> None:
    app = web.Application()
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = golden.answer
    app.add_routes([web.post("/generate_stream", handler), web.post("/v1/completions", handler)])
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    golden.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    ready.set()
    await stop.wait()
    await runner.cleanup()


@pytest.fixture
def golden() -> Iterator[Golden]:
    server, ready, stop = Golden(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(server, ready, stop),))
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def command(golden: Golden, *options: str) -> list[str]:
    # Users end what they have begun, or the server would know of requests that Locust does not.
    common = ["--host", golden.url, "--stop-timeout", "5"]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *common, *options]


def headless(golden: Golden, *options: str) -> str:
    """What Locust prints."""
    full = command(golden, "--headless", "--only-summary", *options)
    done = subprocess.run(full, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: there were failures
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def stats(golden: Golden, folder: Path, *options: str) -> dict[str, Json]:
    """By kind. Of its files this is the one that it writes at the very end."""
    headless(golden, "--json-file", str(folder / "stats"), *options)
    return {each["method"]: each for each in json.loads((folder / "stats.json").read_text())}


def failures(golden: Golden, *options: str) -> dict[str, int]:
    """How many of each kind, as the report at the end has them."""
    printed = re.findall(r"^(\d+) +POST /\S+: (.+?) *$", headless(golden, *options), re.MULTILINE)
    return {kind: int(count) for count, kind in printed}


def median(told: Json) -> float:
    """To the millisecond, as Locust keeps it."""
    return statistics.median(int(ms) for ms, count in told["response_times"].items() for _ in range(count))


@pytest.mark.parametrize("api", ["native", "openai", "tgi"])
def test_requests_first_tokens_and_tokens_are_counted_exactly(golden: Golden, tmp_path: Path, api: str) -> None:
    told = stats(golden, tmp_path, "-u", "3", "-r", "3", "-t", "3s", "--api", api, "--model", "m", "--max-tokens", "8")

    count = len(golden.bodies)
    assert count >= 20
    assert {kind: each["num_requests"] for kind, each in told.items()} == dict.fromkeys(KINDS, count)
    assert sum(each["num_failures"] for each in told.values()) == 0
    assert told["tokens"]["total_response_time"] == TOKENS * count
    # A busy machine makes some late, not all; what a client adds itself is in the quickest too.
    assert min(golden.ttft_ms) <= told["TTFT"]["min_response_time"] <= min(golden.ttft_ms) + 3
    assert median(told["TTFT"]) == pytest.approx(statistics.median(golden.ttft_ms), abs=15)
    assert median(told["TPOT"]) == pytest.approx(statistics.median(golden.tpot_ms), abs=2)
    assert told["POST"]["min_response_time"] >= 1e3 * (FIRST_S + (TOKENS - 1) * GAP_S)
    assert len({prompt.split()[0] for prompt in golden.prompts}) == count
    assert golden.bodies[0]["model"] == "m"


def test_what_is_asked_depends_on_the_seed_alone(golden: Golden) -> None:
    headless(golden, "-u", "1", "-t", "1s", "--prompt-words", "3")
    first = golden.prompts.copy()
    golden.bodies.clear()
    headless(golden, "-u", "1", "-t", "1s", "--prompt-words", "3")

    shared = min(len(first), len(golden.prompts))
    assert shared >= 3
    assert golden.prompts[:shared] == first[:shared]
    assert len(first[0].split()) == 4


@pytest.mark.parametrize(
    ("api", "kind"), [("native", "in band: internal"), ("openai", "in band: internal"), ("tgi", "in band: generation")]
)
def test_an_error_in_band_is_a_failure(golden: Golden, api: str, kind: str) -> None:
    told = failures(golden, "-u", "1", "-t", "1s", "--api", api, "--prompt", "broken")

    assert told == {kind: len(golden.bodies)}


def test_what_failed_has_no_ttft(golden: Golden, tmp_path: Path) -> None:
    told = stats(golden, tmp_path, "-u", "1", "-t", "1s", "--prompt", "broken")

    assert told.keys() == {"POST"}
    assert told["POST"]["num_failures"] == len(golden.bodies)


def test_a_stream_that_is_cut_is_a_failure(golden: Golden) -> None:
    told = failures(golden, "-u", "1", "-t", "1s", "--prompt", "cut")

    assert all("the stream was cut" in kind for kind in told)
    assert sum(told.values()) == len(golden.bodies) > 0


def test_whoever_is_refused_comes_again_when_told_to(golden: Golden) -> None:
    told = failures(golden, "-u", "1", "-t", "3s", "--prompt", "busy")

    assert told == {"http 429": len(golden.bodies)}
    gaps = [later - earlier for earlier, later in zip(golden.arrived, golden.arrived[1:], strict=False)]
    assert gaps
    assert min(gaps) >= 0.99


def test_nobody_there_is_a_failure(golden: Golden) -> None:
    told = failures(golden, "-u", "1", "-t", "1s", "--host", f"http://127.0.0.1:{free_port()}")

    assert sum(told.values()) > 0
    assert all("refused" in kind for kind in told)


def test_the_key_is_sent(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    headless(golden, "-u", "1", "-t", "1s", "--api-key-file", str(tmp_path / "key"), "--ignore-eos")

    assert set(golden.keys) == {"Bearer secret"}
    assert golden.bodies[0]["ignore_eos"] is True


def test_the_steps(golden: Golden) -> None:
    headless(golden, "--step-users", "2", "--step-seconds", "3", "--steps", "3")

    began = golden.arrived[0]
    reached = [max(n for at, n in golden.actives if low <= at - began < low + 1.4) for low in (1.5, 4.5, 7.5)]
    assert reached == [2, 4, 6]


def test_wrong_steps_are_told(golden: Golden) -> None:
    done = subprocess.run(
        command(golden, "--headless", "--step-users", "-1"), capture_output=True, text=True, timeout=60
    )

    assert done.returncode != 0
    assert "--step-users, --step-seconds and --steps are 1 or more" in done.stdout + done.stderr


def test_the_help_has_the_options() -> None:
    full = [sys.executable, "-m", "perf.locustfile"]
    done = subprocess.run(full, capture_output=True, text=True, timeout=60, cwd=LOCUSTFILE.parents[1], check=True)

    for option in ("--api", "--prompt", "--max-tokens", "--step-users", "--api-key-file"):
        assert re.search(rf"^  {option} .*", done.stdout, re.MULTILINE)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fetched(url: str, form: Json | None = None) -> str:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(url, data, timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def eventually(ask: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if ask():
                return
        except OSError:
            pass
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_web_ui(golden: Golden) -> None:
    port = free_port()
    ui = f"http://127.0.0.1:{port}"
    options = ["--web-host", "127.0.0.1", "--web-port", str(port)]
    process = subprocess.Popen(command(golden, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: "max_tokens" in fetched(ui))
        started = json.loads(fetched(f"{ui}/swarm", {"user_count": 1, "spawn_rate": 1, "api": "openai"}))
        assert started["success"]
        eventually(lambda: '"TTFT"' in fetched(f"{ui}/stats/requests"))
        fetched(f"{ui}/stop", {})
    finally:
        process.terminate()
        process.wait(20)
    assert golden.bodies[0]["stream"] is True
