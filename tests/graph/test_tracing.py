"""Traces and log lines of the whole service: one complete tree of spans per request, whatever its outcome."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.collector import Collector, Span
from tests.graph.conftest import EXPORTS_SOON, TracedService, traced_model_config
from tests.graph.service import Service, http_client, stream_events, wait_until, wait_until_idle

pytestmark = pytest.mark.ray

CANARY = "canary-7f3a"
# The clocks of two processes of one machine are read one after the other.
SLACK_NS = 3_000_000
PHASES = ["admission", "decode", "prefill", "queue"]


class Calls:
    """Sends calls of many kinds, each with its own request id; `kinds` and `answers` have the request id as key."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.concurrent = asyncio.Semaphore(6)
        self.kinds: dict[str, str] = {}
        self.answers: dict[str, httpx.Response] = {}

    async def send(
        self, kind: str, path: str, body: Any, cut: float | None = None, events: int = 0, **extra: Any
    ) -> str:
        """Disconnects after `cut` seconds, or after `events` events of the stream, if they are given."""
        name = f"{kind}-{len(self.kinds)}"
        self.kinds[name] = kind
        headers = {"x-request-id": name, **extra}
        async with self.concurrent:
            with suppress(TimeoutError):
                async with asyncio.timeout(cut):
                    async with self._client.stream("POST", path, json=body, headers=headers) as response:
                        self.answers[name] = response
                        if not events:
                            await response.aread()
                            return name
                        read = stream_events(response)
                        for _ in range(events):
                            await anext(read)
        return name


def prompt(n: int) -> str:
    return f"{CANARY} {n}"


def all_kinds(calls: Calls) -> Iterator[Coroutine[Any, Any, str]]:
    for n in range(10):
        body = {"prompt": prompt(n), "max_tokens": 6 + n}
        yield calls.send("whole", "/generate", {**body, "temperature": 0.5, "top_p": 0.5, "seed": n, "stop": ["###"]})
        yield calls.send("stream", "/generate_stream", body)
    for n in range(5):
        chat = {"messages": [{"role": "user", "content": prompt(n)}], "max_tokens": 5}
        yield calls.send("chat", "/v1/chat/completions", {**chat, "stream": n % 2 == 0})
        yield calls.send("several", "/v1/completions", {"prompt": prompt(n), "max_tokens": 4, "n": 3})
        yield calls.send("batch", "/generate_batch", {"prompts": [prompt(n), "b", "x" * 3000], "max_tokens": 3})
        yield calls.send("embedding", "/v1/embeddings", {"input": prompt(n)})
        yield calls.send("long", "/generate", {"prompt": CANARY * 300})
        yield calls.send("invalid", "/generate", {"prompt": prompt(n), "max_tokens": -1})
        yield calls.send("nowhere", f"/nowhere/{n}", {"prompt": prompt(n)})
    endless = {"prompt": prompt(0), "max_tokens": 1900}
    for n in range(5):
        yield calls.send("cut", "/generate_stream", endless, events=1 + n)
        yield calls.send("impatient", "/generate", endless, cut=0.1 + 0.2 * n)
    yield calls.send("late", "/generate", endless)
    yield calls.send("late", "/generate_stream", {**endless, "include_text": False})


@pytest.fixture(scope="module")
def calls(traced: TracedService) -> Calls:
    """All calls, sent once."""

    async def send_all() -> Calls:
        async with http_client(traced.service) as client:
            calls = Calls(client)
            await asyncio.gather(*all_kinds(calls))
            await wait_until_idle(client, "only")
            calls.concurrent = asyncio.Semaphore(60)
            body = {"prompt": prompt(0), "max_tokens": 100}
            await asyncio.gather(*(calls.send("burst", "/generate", body) for _ in range(40)))
            await wait_until_idle(client, "only")
        return calls

    calls = asyncio.run(send_all())
    traced.collector.settle()
    # A client that disconnects at once may have reached the proxy only. The log, which does not depend on tracing,
    # shows which requests reached the ingress.
    arrived = {line.get("request_id") for line in log_records(traced.service)}
    lost = {name for name, kind in calls.kinds.items() if kind == "impatient" and name not in arrived}
    assert len(lost) < 3
    for name in lost:
        del calls.kinds[name]
    return calls


def of_calls(traced: TracedService, names: dict[str, str]) -> dict[str, list[Span]]:
    """The traces by the name of the call."""
    found: dict[str, list[Span]] = {}
    for spans in traced.collector.traces().values():
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
    """The spans are one tree, and each lies within its parent.

    With `may_outlive` a span ends up to 1 s after its parent: a replica learns a moment later that a client has left.
    """
    by_id = {span.id: span for span in spans}
    assert len(by_id) == len(spans)
    roots = [span for span in spans if span.parent not in by_id]
    assert len(roots) == 1, [span.name for span in roots]
    for span in spans:
        assert 0 < span.start <= span.end, span.name
        parent = by_id.get(span.parent)
        if parent is not None:
            assert span.start >= parent.start - SLACK_NS, (span.name, parent.name)
            late = 1_000_000_000 if may_outlive else SLACK_NS
            assert span.end <= parent.end + late, (span.name, parent.name, span.end - parent.end)


async def test_every_request_has_one_complete_tree_of_spans(traced: TracedService, calls: Calls) -> None:
    traces = of_calls(traced, calls.kinds)
    assert len(calls.kinds) >= 60
    assert sorted(traces) == sorted(calls.kinds)
    for name, spans in traces.items():
        check_tree(spans, may_outlive=calls.kinds[name] in ("cut", "impatient"))
        assert server(spans).parent == "", "only HAProxy states when a request arrived"
        kinds = {span.name for span in spans} - {server(spans).name} - set(PHASES)
        assert kinds <= {"chat only", "text_completion only", "embeddings only"}
    assert traced.collector.headers["x-key"] == "secret"


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
async def test_a_generation_span_has_the_outcome_and_its_phases(
    traced: TracedService, calls: Calls, kind: str, answers: int, phases: list[str], outcome: str
) -> None:
    traces = of_calls(traced, calls.kinds)
    for name in (name for name, its in calls.kinds.items() if its == kind):
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


async def test_a_server_span_has_route_status_and_error(traced: TracedService, calls: Calls) -> None:
    traces = of_calls(traced, calls.kinds)
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
    for name, kind in calls.kinds.items():
        if kind in expected and not (kind == "late" and calls.answers[name].status_code == 200):
            span = server(traces[name])
            result = span.attributes.get("http.response.status_code"), span.attributes.get("error.type"), span.error
            assert (span.name, *result) == expected[kind], name
            assert span.attributes.get("http.route", "") == span.name.removeprefix("POST").strip()


async def test_a_server_span_has_the_error_of_an_error_event(traced: TracedService, calls: Calls) -> None:
    (name,) = [n for n, kind in calls.kinds.items() if kind == "late" and calls.answers[n].status_code == 200]
    assert b"deadline_exceeded" in calls.answers[name].content
    span = server(of_calls(traced, calls.kinds)[name])
    assert (span.attributes["error.type"], span.error) == ("deadline_exceeded", True)


async def test_refused_and_cancelled_requests_have_the_phases_that_they_reached(
    traced: TracedService, calls: Calls
) -> None:
    traces = of_calls(traced, calls.kinds)
    for name in (name for name, kind in calls.kinds.items() if kind == "impatient"):
        ((span, below),) = generations(traces[name])
        assert span.attributes["error.type"] == "cancelled"
        assert "queue" in below
        reached = [phase for phase in ("queue", "admission", "prefill", "decode") if phase in below]
        assert reached == ["queue", "admission", "prefill", "decode"][: len(reached)]
    refused = [n for n, k in calls.kinds.items() if k == "burst" and calls.answers[n].status_code == 429]
    assert refused
    for name in refused:
        ((span, below),) = generations(traces[name])
        assert (sorted(below), span.attributes["error.type"]) == (["queue"], "queue_full")
        assert not server(traces[name]).error
    served = [n for n, k in calls.kinds.items() if k == "burst" and calls.answers[n].status_code == 200]
    waits = [below["queue"].end - below["queue"].start for n in served for _, below in generations(traces[n])]
    assert max(waits) > 500_000_000, "8 slots for 24 requests of a second: most of them wait"


async def test_a_generation_span_has_the_attributes_of_the_semantic_conventions(
    traced: TracedService, calls: Calls
) -> None:
    traces = of_calls(traced, calls.kinds)
    name = next(name for name, kind in calls.kinds.items() if kind == "whole")
    ((span, _),) = generations(traces[name])
    attributes = span.attributes
    assert 0 < attributes.pop("gen_ai.response.time_to_first_chunk") < 3
    assert attributes.pop("gen_ai.response.id").startswith(f"{name}-")
    size = len(prompt(0))
    assert attributes == {
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
        "gen_ai.usage.cache_read.input_tokens": attributes["gen_ai.usage.cache_read.input_tokens"],
        "serve_app.outcome": "length",
    }
    assert 0 <= attributes["gen_ai.usage.cache_read.input_tokens"] < size
    assert span.resource["service.name"] == "serve_app"
    assert span.resource["service.instance.id"]


async def test_admissions_and_their_batches_are_linked_both_ways(traced: TracedService, calls: Calls) -> None:
    spans = traced.collector.spans()
    admissions = {span.key: span for span in named(spans, "admission")}
    batches = named(spans, "admit batch")
    assert batches
    assert all(batch.parent == "" for batch in batches)
    assert any(len(batch.links) > 1 for batch in batches), "n=3 enters together"
    for batch in batches:
        assert len(batch.links) == batch.attributes["serve_app.batch.size"], "all are sampled here"
        for member in batch.links & set(admissions):
            # The span of a request that was cancelled while its batch was admitted ended before.
            assert admissions[member].links in (frozenset({batch.key}), frozenset())
    linked = {member: batch.key for batch in batches for member in batch.links}
    for key, admission in admissions.items():
        assert admission.links <= {linked.get(key)}
    finished = [span for span in spans if span.name == "decode"]
    unlinked = {a.parent for a in admissions.values() if not a.links} & {span.parent for span in finished}
    assert unlinked == set()


async def test_a_callers_trace_is_continued_and_answers_have_a_traceparent(traced: TracedService, calls: Calls) -> None:
    async with http_client(traced.service) as client:
        its, other = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"
        body = {"prompt": "a", "max_tokens": 3}
        yes = await client.post("/generate", json=body, headers={"traceparent": f"00-{its}-b7ad6b7169203331-01"})
        no = await client.post("/generate", json=body, headers={"traceparent": f"00-{other}-b7ad6b7169203331-00"})
        broken = await client.post("/generate", json=body, headers={"traceparent": "nonsense"})
    traced.collector.settle()
    traces = traced.collector.traces()
    assert server(traces[its]).parent == "b7ad6b7169203331"
    check_tree(traces[its], may_outlive=False)
    assert yes.headers["traceparent"] == f"00-{its}-{server(traces[its]).id}-01"
    assert "traceparent" not in no.headers
    assert other not in traces
    own = re.fullmatch(r"00-([0-9a-f]{32})-[0-9a-f]{16}-0[13]", broken.headers["traceparent"])
    assert own is not None
    assert own[1] in traces


def log_records(service: Service) -> list[dict[str, Any]]:
    """The log of the model replicas and of the ingress."""
    return [json.loads(line) for line in service.log()]


async def test_the_log_is_json_with_the_ids_of_the_request(traced: TracedService, calls: Calls) -> None:
    lines = log_records(traced.service)
    for line in lines:
        assert {"time", "level", "logger", "message", "replica"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    traces = of_calls(traced, calls.kinds)
    logged = {line["request_id"]: line for line in lines if line["logger"] == "serve_app.telemetry.http_spans"}
    assert set(calls.kinds) <= set(logged)
    for name in calls.kinds:
        span, line = server(traces[name]), logged[name]
        assert (line["trace_id"], line["span_id"]) == span.key
        assert line.get("status") == span.attributes.get("http.response.status_code")
        assert line.get("error") == span.attributes.get("error.type")
        assert line["duration_ms"] == pytest.approx((span.end - span.start) / 1e6, abs=0.01)
    assert any(line.get("model") == "only" for line in lines)


async def test_a_variant_is_in_its_spans_and_log_lines_and_a_guard_stops_a_slow_one(traced: TracedService) -> None:
    """The guard compares the times of answers of at least 20 users of each variant."""

    async def ask(user: int) -> str:
        body = {"model": "paced", "user": f"user-{user}", "prompt": "abc", "max_tokens": 4}
        answer = await client.post("/v1/completions", json=body, headers={"x-request-id": f"paced-{user}"})
        assert (answer.status_code, answer.json()["model"]) == (200, "paced")
        return answer.headers["x-variant"]

    async with http_client(traced.service) as client:
        first = []
        for begin in range(0, 120, 12):
            first += await asyncio.gather(*map(ask, range(begin, begin + 12)))
        assert 40 <= first.count("candidate") <= 80

        async def stopped() -> str:
            return str((await client.get("/experiments")).json()["experiments"][0]["stopped"])

        reason = await wait_until(stopped)
        assert re.match(r"candidate: tpot is 0\.0\d+, that of the control 0\.0\d+, the tolerance ×2$", reason)
        assert {await ask(user) for user in range(20)} == {"control"}
    user = first.index("candidate", 20)
    spans = [span for span in traced.collector.settle() if "serve_app.variant" in span.attributes]
    found = {(span.attributes["serve_app.experiment"], span.attributes["serve_app.variant"]) for span in spans}
    assert found == {("paced", "control"), ("paced", "candidate")}
    lines = [json.loads(line) for line in traced.service.log() if line.startswith("{")]
    (line,) = (line for line in lines if line.get("request_id") == f"paced-{user}" and line.get("route"))
    assert (line["experiment"], line["variant"]) == ("paced", "candidate")
    assert any("was stopped by a guard" in line["message"] for line in lines)


async def test_prompts_are_in_no_span_and_no_log(traced: TracedService, calls: Calls) -> None:
    assert CANARY.encode() not in bytes(traced.collector.raw)
    logs = traced.service.folder / "ray/session_latest/logs"
    assert [file for file in logs.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()] == []


async def send_all(service: Service, count: int, headers: dict[str, str] | None = None) -> list[httpx.Response]:
    body = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 12}
    async with http_client(service) as client:
        requests = (client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(count))
        return list(await asyncio.gather(*requests))


@pytest.mark.ci
async def test_a_share_of_requests_is_traced_with_content_and_a_stalled_collector_delays_none() -> None:
    """Behind HAProxy, which states when each request arrived."""
    environment = {**EXPORTS_SOON, "OTEL_BSP_MAX_QUEUE_SIZE": "256", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64"}
    with Collector() as collector:
        tracing = {"endpoint": collector.endpoint, "sampling_ratio": 0.25, "capture_content": True}
        settings = {"tracing": tracing, "log_format": "json"}
        with Service([traced_model_config()], environment=environment, telemetry=settings) as service:
            service.wait_until_ready()
            answers = [answer for _ in range(15) for answer in await send_all(service, 10)]
            collector.settle()
            check_sampled(answers, collector)
            collector.stall()
            await check_stalled(service)
            began = time.monotonic()
            assert service.interrupt() in (0, 130)
            assert time.monotonic() - began < 20


def check_sampled(answers: list[httpx.Response], collector: Collector) -> None:
    """150 requests, a quarter of them traced: 37.5, and five standard deviations."""
    assert {answer.status_code for answer in answers} == {200}
    sampled = {answer.headers["traceparent"].split("-")[1] for answer in answers if "traceparent" in answer.headers}
    assert 15 <= len(sampled) <= 65
    found = collector.traces()
    assert {trace for trace, spans in found.items() if generations(spans)} == sampled
    for trace in sampled:
        check_tree(found[trace], may_outlive=False)
        (proxy,) = named(found[trace], "proxy")
        assert proxy.parent == ""
        ((span, below),) = generations(found[trace])
        assert sorted(below) == PHASES
        assert json.loads(span.attributes["gen_ai.input.messages"]) == [
            {"role": "user", "parts": [{"type": "text", "content": CANARY}]}
        ]
        (message,) = json.loads(span.attributes["gen_ai.output.messages"])
        text = f"user: {CANARY}"[:12]
        assert message == {
            "role": "assistant",
            "parts": [{"type": "text", "content": text}],
            "finish_reason": "length",
        }
    batches = [span for spans in found.values() for span in named(spans, "admit batch")]
    linked = {member for batch in batches for member in batch.links}
    assert {span.key for trace in sampled for span in named(found[trace], "admission")} == linked
    assert all(batch.attributes["serve_app.batch.size"] >= len(batch.links) for batch in batches)


async def check_stalled(service: Service) -> None:
    """160 sampled requests have more spans than the exporter's queue holds. An export would wait for 10 s."""
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    for _ in range(20):
        began = time.monotonic()
        answers = await send_all(service, 8, headers)
        assert time.monotonic() - began < 3, "8 requests of 12 steps of 10 ms"
        assert {answer.status_code for answer in answers} == {200}
        assert all("traceparent" in answer.headers for answer in answers)
