"""Traces and log lines of the whole service: one complete tree a request, whatever became of it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import Collector, Span
from tests.graph.house import FRONTS, ROOT, Service, caller, frames_of, idle, model

pytestmark = pytest.mark.ray

CANARY = "canary-7f3a"
# Two clocks of one machine, read one after the other.
SLACK_NS = 3_000_000
ENVIRONMENT = {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=secret"}
PHASES = ["admission", "decode", "prefill", "queue"]


@dataclass
class World:
    """A service that traces, and where it sends what it finds. `proxied`: its proxy says when requests came."""

    service: Service
    collector: Collector
    proxied: bool
    fused: bool


def a_model(**engine: Any) -> dict[str, Any]:
    return model(
        "only",
        "builtin:toy?step_ms=10",
        deployment={"max_ongoing_requests": 16, "max_queued_requests": 8},
        batching={"max_batch_size": 16, "batch_wait_timeout_s": 0.01},
        embeddings=True,
        engine={"max_running": 8, **engine},
    )


def telemetry(collector: Collector, **tracing: Any) -> dict[str, Any]:
    return {"tracing": {"endpoint": collector.endpoint, "sampling_ratio": 1, **tracing}, "log_format": "json"}


@pytest.fixture(scope="module", params=["fused", "apart"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    fused = request.param == "fused"
    front = FRONTS["haproxy" if fused else "python"]
    with Collector() as collector:
        with Service(
            [a_model()],
            environment={**ENVIRONMENT, **front},
            fused=fused,
            telemetry=telemetry(collector),
            request_timeout_s=3,
            heartbeat_s=0.3,
            max_body_bytes=65_536,
        ) as service:
            service.wait_for("answers on")
            yield World(service, collector, proxied=fused, fused=fused)


class Mix:
    """Calls of every kind, each by a name of its own; `kinds` remembers which name was what."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._room = asyncio.Semaphore(6)
        self.kinds: dict[str, str] = {}
        self.answers: dict[str, httpx.Response] = {}

    async def ask(
        self, kind: str, path: str, body: Any, cut: float | None = None, frames: int = 0, **extra: Any
    ) -> str:
        """`cut`: hang up after so many seconds; `frames`: or after so many frames."""
        name = f"{kind}-{len(self.kinds)}"
        self.kinds[name] = kind
        headers = {"x-request-id": name, **extra}
        async with self._room:
            with suppress(TimeoutError):
                async with asyncio.timeout(cut):
                    async with self._client.stream("POST", path, json=body, headers=headers) as response:
                        self.answers[name] = response
                        if not frames:
                            await response.aread()
                            return name
                        read = frames_of(response)
                        for _ in range(frames):
                            await anext(read)
        return name


def prompt(n: int) -> str:
    return f"{CANARY} {n}"


def calls(mix: Mix) -> Iterator[Coroutine[Any, Any, str]]:
    for n in range(10):
        body = {"prompt": prompt(n), "max_tokens": 6 + n}
        yield mix.ask("whole", "/generate", {**body, "temperature": 0.5, "top_p": 0.5, "seed": n, "stop": ["###"]})
        yield mix.ask("stream", "/generate_stream", body)
    for n in range(5):
        chat = {"messages": [{"role": "user", "content": prompt(n)}], "max_tokens": 5}
        yield mix.ask("chat", "/v1/chat/completions", {**chat, "stream": n % 2 == 0})
        yield mix.ask("several", "/v1/completions", {"prompt": prompt(n), "max_tokens": 4, "n": 3})
        yield mix.ask("batch", "/generate_batch", {"prompts": [prompt(n), "b", "x" * 3000], "max_tokens": 3})
        yield mix.ask("embedding", "/v1/embeddings", {"input": prompt(n)})
        yield mix.ask("long", "/generate", {"prompt": CANARY * 300})
        yield mix.ask("invalid", "/generate", {"prompt": prompt(n), "max_tokens": -1})
        yield mix.ask("nowhere", f"/nowhere/{n}", {"prompt": prompt(n)})
    endless = {"prompt": prompt(0), "max_tokens": 1900}
    for n in range(5):
        yield mix.ask("cut", "/generate_stream", endless, frames=1 + n)
        yield mix.ask("impatient", "/generate", endless, cut=0.1 + 0.2 * n)
    yield mix.ask("late", "/generate", endless)
    yield mix.ask("late", "/generate_stream", {**endless, "include_text": False})


@pytest.fixture(scope="module")
def mixed(world: World) -> Mix:
    """The mix, played once to each service."""

    async def play() -> Mix:
        async with caller(world.service) as client:
            mix = Mix(client)
            await asyncio.gather(*calls(mix))
            await idle(client, "only")
            mix._room = asyncio.Semaphore(60)
            body = {"prompt": prompt(0), "max_tokens": 100}
            await asyncio.gather(*(mix.ask("burst", "/generate", body) for _ in range(40)))
            await idle(client, "only")
        return mix

    mix = asyncio.run(play())
    world.collector.settle()
    # Who leaves at once may have been with the proxy only. The log knows, and it does not depend on tracing.
    came = {line.get("request_id") for line in log_lines(world.service)}
    lost = {name for name, kind in mix.kinds.items() if kind == "impatient" and name not in came}
    assert len(lost) < 3
    for name in lost:
        del mix.kinds[name]
    return mix


def of_calls(world: World, names: dict[str, str]) -> dict[str, list[Span]]:
    """The traces by the name of the call."""
    found: dict[str, list[Span]] = {}
    for spans in world.collector.traces().values():
        for span in spans:
            name = span.attributes.get("serve_app.request_id")
            if name in names:
                assert name not in found, f"two traces of {name}"
                found[name] = spans
    return found


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def server(spans: list[Span]) -> Span:
    (span,) = [span for span in spans if span.kind == "SERVER"]
    return span


def generations(spans: list[Span]) -> list[tuple[Span, dict[str, Span]]]:
    """Each generation with its phases."""
    found = []
    for span in spans:
        if "gen_ai.operation.name" in span.attributes:
            below = [child for child in spans if child.parent == span.id]
            phases = {child.name: child for child in below}
            assert len(phases) == len(below), "a phase twice"
            found.append((span, phases))
    return found


def check_tree(spans: list[Span], may_outlive: bool) -> None:
    by_id = {span.id: span for span in spans}
    assert len(by_id) == len(spans)
    roots = [span for span in spans if span.parent not in by_id]
    assert len(roots) == 1, [span.name for span in roots]
    for span in spans:
        assert 0 < span.start <= span.end, span.name
        parent = by_id.get(span.parent)
        if parent is not None:
            assert span.start >= parent.start - SLACK_NS, (span.name, parent.name)
            # Behind an ingress the model learns a moment later that a client has left.
            late = 1_000_000_000 if may_outlive else SLACK_NS
            assert span.end <= parent.end + late, (span.name, parent.name, span.end - parent.end)


async def test_every_request_has_one_complete_tree(world: World, mixed: Mix) -> None:
    traces = of_calls(world, mixed.kinds)
    assert len(mixed.kinds) >= 60
    assert sorted(traces) == sorted(mixed.kinds)
    for name, spans in traces.items():
        check_tree(spans, may_outlive=not world.fused and mixed.kinds[name] in ("cut", "impatient"))
        assert len(named(spans, "proxy")) == world.proxied
        top = named(spans, "proxy") or [server(spans)]
        assert top[0].parent == ""
        kinds = {span.name for span in spans} - {"proxy", server(spans).name} - set(PHASES)
        assert kinds <= {"chat only", "text_completion only", "embeddings only"}
    assert world.collector.headers["x-key"] == "secret"


@pytest.mark.parametrize(
    ("kind", "answers", "phases", "outcome"),
    [
        ("whole", 1, PHASES, "length"),
        ("stream", 1, PHASES, "length"),
        ("chat", 1, PHASES, "length"),
        ("several", 3, PHASES, "length"),
        ("embedding", 1, ["admission", "prefill", "queue"], "embedded"),
        ("long", 1, ["admission", "queue"], "prompt_too_long"),
        ("cut", 1, PHASES, "cancelled"),
        ("late", 1, PHASES, "deadline_exceeded"),
        ("invalid", 0, [], ""),
        ("nowhere", 0, [], ""),
    ],
)
async def test_a_trace_says_what_became_of_the_request(
    world: World, mixed: Mix, kind: str, answers: int, phases: list[str], outcome: str
) -> None:
    traces = of_calls(world, mixed.kinds)
    for name in (name for name, its in mixed.kinds.items() if its == kind):
        found = generations(traces[name])
        assert len(found) == answers
        for span, below in found:
            assert sorted(below) == phases, name
            assert span.attributes["serve_app.outcome"] == outcome
            check_phases(below)
            finished = outcome in ("length", "embedded")
            assert span.error == (not finished and outcome != "cancelled")
            assert ("error.type" in span.attributes) == (not finished)
            if outcome == "length":
                assert span.attributes["gen_ai.response.finish_reasons"] == ["length"]
                tokens = below["decode"].attributes["serve_app.generated_tokens"]
                assert tokens == span.attributes["gen_ai.usage.output_tokens"]


def check_phases(below: dict[str, Span]) -> None:
    """They follow one another, and admission is a part of the wait."""
    if "prefill" in below:
        assert abs(below["queue"].end - below["prefill"].start) <= 1000, "a float's rounding"
        assert below["admission"].end <= below["prefill"].start
    if "decode" in below:
        assert below["prefill"].end == below["decode"].start


async def test_a_server_span_says_what_was_asked_and_answered(world: World, mixed: Mix) -> None:
    traces = of_calls(world, mixed.kinds)
    expected = {
        "whole": ("POST /generate", 200, None, False),
        "stream": ("POST /generate_stream", 200, None, False),
        "chat": ("POST /v1/chat/completions", 200, None, False),
        "batch": ("POST /generate_batch", 200, "prompt_too_long", False),
        "embedding": ("POST /v1/embeddings", 200, None, False),
        "long": ("POST /generate", 422, "prompt_too_long", False),
        "invalid": ("POST /generate", 422, "invalid_request", False),
        "nowhere": ("POST", 404, "not_found", False),
        "cut": ("POST /generate_stream", 200, "cancelled", False),
        "impatient": ("POST /generate", None, "cancelled", False),
        "late": ("POST /generate", 504, "deadline_exceeded", True),
    }
    for name, kind in mixed.kinds.items():
        if kind in expected and not (kind == "late" and mixed.answers[name].status_code == 200):
            span = server(traces[name])
            told = span.attributes.get("http.response.status_code"), span.attributes.get("error.type"), span.error
            assert (span.name, *told) == expected[kind], name
            assert span.attributes.get("http.route", "") == span.name.removeprefix("POST").strip()


async def test_an_error_in_band_is_seen(world: World, mixed: Mix) -> None:
    (name,) = [n for n, kind in mixed.kinds.items() if kind == "late" and mixed.answers[n].status_code == 200]
    assert b"deadline_exceeded" in mixed.answers[name].content
    span = server(of_calls(world, mixed.kinds)[name])
    assert (span.attributes["error.type"], span.error) == ("deadline_exceeded", True)


async def test_who_is_refused_or_leaves_early_has_the_phases_that_were_reached(world: World, mixed: Mix) -> None:
    traces = of_calls(world, mixed.kinds)
    for name in (name for name, kind in mixed.kinds.items() if kind == "impatient"):
        ((span, below),) = generations(traces[name])
        assert span.attributes["error.type"] == "cancelled"
        assert "queue" in below
        reached = [phase for phase in ("queue", "admission", "prefill", "decode") if phase in below]
        assert reached == ["queue", "admission", "prefill", "decode"][: len(reached)]
    refused = [n for n, k in mixed.kinds.items() if k == "burst" and mixed.answers[n].status_code == 429]
    assert refused
    for name in refused:
        ((span, below),) = generations(traces[name])
        assert (sorted(below), span.attributes["error.type"]) == (["queue"], "queue_full")
        assert not server(traces[name]).error
    served = [n for n, k in mixed.kinds.items() if k == "burst" and mixed.answers[n].status_code == 200]
    waits = [below["queue"].end - below["queue"].start for n in served for _, below in generations(traces[n])]
    assert max(waits) > 500_000_000, "8 slots for 24 requests of a second: most of them wait"


async def test_generations_carry_what_the_conventions_name(world: World, mixed: Mix) -> None:
    traces = of_calls(world, mixed.kinds)
    name = next(name for name, kind in mixed.kinds.items() if kind == "whole")
    ((span, _),) = generations(traces[name])
    told = span.attributes
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 3
    assert told.pop("gen_ai.response.id").startswith(f"{name}-")
    size = len(prompt(0))
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "serve_app",
        "gen_ai.request.model": "only",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 0,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.frequency_penalty": 0,
        "gen_ai.request.presence_penalty": 0,
        "gen_ai.request.stop_sequences": ["###"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": size,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": told["gen_ai.usage.cache_read.input_tokens"],
        "serve_app.outcome": "length",
    }
    assert 0 <= told["gen_ai.usage.cache_read.input_tokens"] < size
    assert span.about["service.name"] == "serve_app"
    assert span.about["service.instance.id"]


async def test_admissions_and_their_batches_are_linked_both_ways(world: World, mixed: Mix) -> None:
    spans = world.collector.spans()
    admissions = {span.key: span for span in named(spans, "admission")}
    batches = named(spans, "admit batch")
    assert batches
    assert all(batch.parent == "" for batch in batches)
    assert any(len(batch.links) > 1 for batch in batches), "n=3 enters together"
    for batch in batches:
        assert len(batch.links) == batch.attributes["serve_app.batch.size"], "all are sampled here"
        for member in batch.links & set(admissions):
            # Whoever left while its batch was let in was told of before.
            assert admissions[member].links in (frozenset({batch.key}), frozenset())
    linked = {member: batch.key for batch in batches for member in batch.links}
    for key, admission in admissions.items():
        assert admission.links <= {linked.get(key)}
    finished = [span for span in spans if span.name == "decode"]
    unlinked = {a.parent for a in admissions.values() if not a.links} & {span.parent for span in finished}
    assert unlinked == set()


async def test_a_callers_trace_goes_on_and_answers_name_theirs(world: World, mixed: Mix) -> None:
    async with caller(world.service) as client:
        its, other = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"
        body = {"prompt": "a", "max_tokens": 3}
        yes = await client.post("/generate", json=body, headers={"traceparent": f"00-{its}-b7ad6b7169203331-01"})
        no = await client.post("/generate", json=body, headers={"traceparent": f"00-{other}-b7ad6b7169203331-00"})
        broken = await client.post("/generate", json=body, headers={"traceparent": "nonsense"})
    world.collector.settle()
    traces = world.collector.traces()
    top = named(traces[its], "proxy") or [server(traces[its])]
    assert top[0].parent == "b7ad6b7169203331"
    check_tree(traces[its], may_outlive=False)
    assert yes.headers["traceparent"] == f"00-{its}-{server(traces[its]).id}-01"
    assert "traceparent" not in no.headers
    assert other not in traces
    own = re.fullmatch(r"00-([0-9a-f]{32})-[0-9a-f]{16}-0[13]", broken.headers["traceparent"])
    assert own is not None
    assert own[1] in traces


def log_lines(service: Service) -> list[dict[str, Any]]:
    """Of the models and the ingress."""
    files = (service.folder / "ray/session_latest/logs/serve").glob("replica_*.log")
    ours = [file for file in files if "Hub" not in file.name]
    return [json.loads(line) for file in ours for line in file.read_text().splitlines()]


async def test_the_log_is_json_with_the_ids_of_the_request(world: World, mixed: Mix) -> None:
    lines = log_lines(world.service)
    for line in lines:
        assert {"time", "level", "logger", "message", "replica"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    traces = of_calls(world, mixed.kinds)
    told = {line["request_id"]: line for line in lines if line["logger"] == "serve_app.telemetry.http_spans"}
    assert set(mixed.kinds) <= set(told)
    for name in mixed.kinds:
        span, line = server(traces[name]), told[name]
        assert (line["trace_id"], line["span_id"]) == span.key
        assert line.get("status") == span.attributes.get("http.response.status_code")
        assert line.get("error") == span.attributes.get("error.type")
        assert line["duration_ms"] == pytest.approx((span.end - span.start) / 1e6, abs=0.01)
    assert any(line.get("model") == "only" for line in lines)


async def test_nobodys_words_are_in_spans_or_logs(world: World, mixed: Mix) -> None:
    assert CANARY.encode() not in bytes(world.collector.raw)
    logs = world.service.folder / "ray/session_latest/logs"
    assert [file for file in logs.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()] == []


async def several(service: Service, count: int, send: Callable[[httpx.AsyncClient, int], Any]) -> list[httpx.Response]:
    async with caller(service) as client:
        return list(await asyncio.gather(*(send(client, n) for n in range(count))))


async def test_content_is_captured_where_the_configuration_says_so_and_a_share_is_traced() -> None:
    settings = {"capture_content": True, "sampling_ratio": 0.25}
    with Collector() as collector:
        with Service(
            [a_model()], environment=ENVIRONMENT, fused=True, telemetry=telemetry(collector, **settings)
        ) as service:
            service.wait_for("answers on")
            body = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 12}

            async def send(client: httpx.AsyncClient, n: int) -> httpx.Response:
                return await client.post("/v1/chat/completions", json=body)

            answers = [answer for _ in range(15) for answer in await several(service, 10, send)]
            collector.settle()
        assert {answer.status_code for answer in answers} == {200}
        traced = {answer.headers["traceparent"].split("-")[1] for answer in answers if "traceparent" in answer.headers}
        assert 15 <= len(traced) <= 65, "150 in a quarter: 37.5, and five standard deviations"
        found = collector.traces()
        assert {t for t in traced if generations(found[t])} == traced
        for trace in traced:
            ((span, below),) = generations(found[trace])
            assert sorted(below) == PHASES
            assert json.loads(span.attributes["gen_ai.input.messages"]) == [
                {"role": "user", "parts": [{"type": "text", "content": CANARY}]}
            ]
            (said,) = json.loads(span.attributes["gen_ai.output.messages"])
            text = f"user: {CANARY}"[:12]
            assert said == {
                "role": "assistant",
                "parts": [{"type": "text", "content": text}],
                "finish_reason": "length",
            }
        generated = {t for t, spans in found.items() if generations(spans)}
        assert generated == traced
        batches = [span for spans in found.values() for span in named(spans, "admit batch")]
        linked = {member for batch in batches for member in batch.links}
        assert {span.key for t in traced for span in named(found[t], "admission")} == linked
        assert all(batch.attributes["serve_app.batch.size"] >= len(batch.links) for batch in batches)


async def test_a_collector_that_does_not_answer_is_nobodys_trouble() -> None:
    environment = {**ENVIRONMENT, "OTEL_BSP_MAX_QUEUE_SIZE": "64", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces", "sampling_ratio": 1}
        with Service([a_model()], environment=environment, fused=True, telemetry={"tracing": tracing}) as service:
            service.wait_for("answers on")

            async def send(client: httpx.AsyncClient, n: int) -> httpx.Response:
                return await client.post("/generate", json={"prompt": "abc", "max_tokens": 5})

            times = []
            for _ in range(20):
                began = time.monotonic()
                answers = await several(service, 8, send)
                times.append(time.monotonic() - began)
                assert {answer.status_code for answer in answers} == {200}
                assert {answer.json()["text"] for answer in answers} == {"abcab"}
                assert all("traceparent" in answer.headers for answer in answers)
            assert max(times) < 3, "8 requests of 5 steps of 10 ms; an export would wait 10 s"
            began = time.monotonic()
            assert service.interrupt() in (0, 130)
            assert time.monotonic() - began < 20


def test_a_service_that_cannot_trace_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.exporter'] = None\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Service([a_model()], environment=environment, fused=True, telemetry={"tracing": {}}) as service:
        assert service.process.wait(timeout=90) == 1
        assert "pip install 'serve_app[tracing]'" in service.said().rstrip().splitlines()[-1]
