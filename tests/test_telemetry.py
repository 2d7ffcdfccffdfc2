"""Log lines as JSON, who enters an engine together, and that what is off is not there."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette

from serve_app.config import ConfigError, Engine as EngineConfig, Telemetry as Settings, Tracing
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.deployments.telemetry import Telemetry, check
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.telemetry.engine_spans import TracedAdmitter, TracedStream
from serve_app.telemetry.logs import write_json
from serve_app.telemetry.otlp import Exporter
from tests.api.scripted import ScriptedGateway, app_config
from tests.collector import Collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """Ray Serve's logger as in a replica that keeps lines back."""
    logger = logging.getLogger("ray.serve")
    before = logger.handlers[:], logger.level
    path = tmp_path / "replica.log"
    file = logging.FileHandler(path)
    logger.handlers[:] = [MemoryHandler(1000, target=file)]
    logger.setLevel(logging.INFO)
    yield path
    file.close()
    logger.handlers[:] = before[0]
    logger.setLevel(before[1])


def test_a_line_is_one_object_that_is_there_at_once(log: Path) -> None:
    write_json("small", "abc")
    logging.getLogger("ray.serve").warning("%s line\nof two", "one", extra={"told": {"status": 200, "error": None}})
    (line,) = map(json.loads, log.read_text().splitlines())
    assert time.time() - 60 < _instant(line.pop("time")) <= time.time() + 1
    assert line == {
        "level": "WARNING",
        "logger": "ray.serve",
        "message": "one line\nof two",
        "status": 200,
        "model": "small",
        "replica": "abc",
    }


def _instant(text: str) -> float:
    assert text.endswith("Z")
    return datetime.fromisoformat(text).timestamp()


def test_an_exception_is_in_its_line(log: Path) -> None:
    write_json("", "abc")
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("ray.serve").exception("it failed")
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: odd")
    assert "model" not in line


def test_what_is_off_is_not_there() -> None:
    program = (
        "import sys\n"
        "from serve_app.config import Telemetry as Settings\n"
        "from serve_app.deployments.telemetry import Telemetry\n"
        "from tests.api.scripted import ScriptedGateway, app_config\n"
        "Telemetry(Settings(), '', 'r').app(ScriptedGateway(), app_config())\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not any(name.startswith("opentelemetry") for name in done.stdout.split())


@pytest.mark.parametrize(("settings", "layers"), [(Settings(), 0), (Settings(tracing=Tracing()), 1)])
def test_the_front_door_has_a_layer_more_only_if_something_watches(settings: Settings, layers: int) -> None:
    telemetry = Telemetry(settings, "", "r")
    app = telemetry.app(ScriptedGateway(), app_config())
    telemetry.stop()
    assert isinstance(app, Starlette)
    assert [getattr(m.cls, "__name__", "") for m in app.user_middleware].count("Observe") == layers


def test_tracing_without_its_packages_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "serve_app.telemetry.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'serve_app\[tracing\]'"):
        check(Settings(tracing=Tracing()))
    check(Settings())


def test_what_is_left_is_sent_at_the_end_and_a_dead_collector_holds_nobody_up() -> None:
    with Collector() as collector:
        exporter = Exporter(Tracing(endpoint=collector.endpoint, sampling_ratio=1), "small", "abc")
        exporter.tracer.start_span("last").end()
        exporter.stop()
        (span,) = collector.spans()
        assert (span.name, span.about["service.instance.id"], span.about["serve_app.model"]) == ("last", "abc", "small")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = Exporter(Tracing(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", sampling_ratio=1), "", "r")
        exporter.tracer.start_span("lost").end()
        began = time.monotonic()
        exporter.stop()
        assert time.monotonic() - began < 4


def test_a_trace_that_nobody_sampled_costs_no_span() -> None:
    with Collector() as collector:
        exporter = Exporter(Tracing(endpoint=collector.endpoint, sampling_ratio=0), "", "r")
        span = exporter.tracer.start_span("no")
        assert not span.is_recording()
        span.end()
        exporter.stop()
        assert collector.exports == 0


class Entrance:
    """An engine with a toy, entered through TracedAdmitter."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        config = EngineConfig(max_running=4, draft_tokens=0)
        self.engine = NativeEngine(lambda: ToyRunner(config), config)
        self.phases = TracedAdmitter(provider.get_tracer("test"), self.engine.admit)

    def open(self, text: str, traceparent: str = PARENT) -> TokenStream:
        now = time.monotonic()
        request = GenerationRequest(
            text, "m", TextPrompt(text), SamplingParams(max_tokens=4), now, now + 10, traceparent=traceparent
        )
        return self.phases.open(request)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
async def entrance() -> AsyncIterator[Entrance]:
    entrance = Entrance()
    await asyncio.to_thread(entrance.engine.start)
    yield entrance
    await asyncio.to_thread(entrance.engine.stop)


async def read(stream: TokenStream) -> str:
    text = ""
    async for chunk in stream.chunks(0):
        text += "".join(event.text for event in chunk.events)
    return text


async def test_a_batch_is_told_of_with_those_who_are_traced(entrance: Entrance) -> None:
    traced, plain, refused = entrance.open("ab"), entrance.open("cd", ""), entrance.open("x" * 5000)
    assert isinstance(traced, TracedStream)
    assert isinstance(refused, TracedStream)
    assert type(plain) is TokenStream
    outcomes = await asyncio.to_thread(entrance.phases.admit, [traced, plain, refused])
    assert [outcome is None for outcome in outcomes] == [True, True, False]
    assert [await read(traced), await read(plain)] == ["abab", "cdcd"]
    for stream in (traced, plain, refused, traced):
        stream.close()
    (batch,) = entrance.spans("admit batch")
    assert batch.parent is None
    assert dict(batch.attributes or {}) == {"serve_app.batch.size": 3}
    admissions = entrance.spans("admission")
    assert [link.context for link in batch.links] == [traced.admission, refused.admission]
    assert [[link.context for link in one.links] for one in admissions] == [[batch.get_span_context()]] * 2
    assert [dict(one.attributes or {}).get("error.type") for one in admissions] == [None, "prompt_too_long"]
    ((prefill,), (decode,)) = entrance.spans("prefill"), entrance.spans("decode")
    assert prefill.end_time == decode.start_time
    assert dict(decode.attributes or {}) == {"serve_app.generated_tokens": 4}


async def test_a_batch_that_nobody_traces_is_not_told_of(entrance: Entrance) -> None:
    stream = entrance.open("ab", "")
    assert entrance.phases.admit([stream]) == [None]
    assert await read(stream) == "abab"
    stream.close()
    assert entrance._exporter.get_finished_spans() == ()


async def test_one_who_left_on_the_way_in_is_told_of_once(entrance: Entrance) -> None:
    stream = entrance.open("ab")
    stream.close()
    assert entrance.phases.admit([stream]) == [None]
    stream.close()
    (admission,) = entrance.spans("admission")
    assert admission.links == ()
    assert len(entrance.spans("admit batch")) == 1
    assert entrance.spans("prefill") == []
