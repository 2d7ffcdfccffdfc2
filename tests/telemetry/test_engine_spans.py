"""Traced requests have spans for admission, prefill and decode, and batches with traced requests have a span."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve_app.config import NativeOptions
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.telemetry.engine_spans import TracedAdmitter, TracedStream, read_clocks

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class TracedToy:
    """A toy engine behind a TracedAdmitter, and the spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        config = NativeOptions(max_running=4, draft_tokens=0)
        self.engine = NativeEngine(lambda: ToyRunner(config), config)
        self.admitter = TracedAdmitter(provider.get_tracer("test"), self.engine.admit)

    def open(self, text: str, traceparent: str = PARENT, waited_s: float = 0.0) -> TokenStream:
        """The stream of a request that arrived at the ingress `waited_s` seconds ago."""
        arrived = time.monotonic() - waited_s
        params = SamplingParams(max_tokens=4)
        request = GenerationRequest(text, "m", TextPrompt(text), params, arrived, arrived + 60, traceparent=traceparent)
        return self.admitter.open(request)

    async def complete(self, stream: TokenStream) -> str:
        """Admit a stream, read its text and close it."""
        assert await asyncio.to_thread(self.admitter.admit, [stream]) == [None]
        text = await read(stream)
        stream.close()
        return text

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if name in (None, span.name)]


@pytest.fixture
async def toy() -> AsyncIterator[TracedToy]:
    toy = TracedToy()
    await asyncio.to_thread(toy.engine.start)
    yield toy
    await asyncio.to_thread(toy.engine.stop)


async def read(stream: TokenStream) -> str:
    text = ""
    async for chunk in stream.chunks(0):
        text += "".join(event.text for event in chunk.events)
    return text


async def test_the_span_of_a_batch_is_linked_to_its_traced_requests(toy: TracedToy) -> None:
    traced, plain, refused = toy.open("ab"), toy.open("cd", ""), toy.open("x" * 5000)
    assert isinstance(traced, TracedStream)
    assert isinstance(refused, TracedStream)
    assert type(plain) is TokenStream
    outcomes = await asyncio.to_thread(toy.admitter.admit, [traced, plain, refused])
    assert [outcome is None for outcome in outcomes] == [True, True, False]
    assert [await read(traced), await read(plain)] == ["abab", "cdcd"]
    for stream in (traced, plain, refused, traced):
        stream.close()
    (batch,) = toy.spans("admit batch")
    assert batch.parent is None
    assert dict(batch.attributes or {}) == {"serve_app.batch.size": 3}
    admissions = toy.spans("admission")
    assert [link.context for link in batch.links] == [traced.admission, refused.admission]
    assert [[link.context for link in one.links] for one in admissions] == [[batch.get_span_context()]] * 2
    assert [dict(one.attributes or {}).get("error.type") for one in admissions] == [None, "prompt_too_long"]
    ((prefill,), (decode,)) = toy.spans("prefill"), toy.spans("decode")
    assert prefill.end_time == decode.start_time
    assert dict(decode.attributes or {}) == {"serve_app.generated_tokens": 4}


async def test_spans_lie_within_the_time_in_the_models_process(toy: TracedToy) -> None:
    """The 20 s that a request waited at the ingress, for example for a model to wake, do not move its spans."""
    before = time.time_ns()
    assert await toy.complete(toy.open("ab", waited_s=20)) == "abab"
    instants = [
        instant
        for name in ("admission", "prefill", "decode")
        for span in toy.spans(name)
        for instant in (span.start_time, span.end_time)
    ]
    assert len(instants) == 6
    assert all(instant is not None and before <= instant <= time.time_ns() + 10**8 for instant in instants)


async def test_the_first_chunk_has_the_instant_at_which_the_prefill_began(toy: TracedToy) -> None:
    before = time.time_ns()
    stream = toy.open("ab", waited_s=20)
    await asyncio.to_thread(toy.admitter.admit, [stream])
    chunks = [chunk async for chunk in stream.chunks(0)]
    stream.close()
    assert before <= chunks[0].began_ns <= time.time_ns()
    (prefill,) = toy.spans("prefill")
    assert prefill.start_time == pytest.approx(chunks[0].began_ns, abs=10**6)


async def test_a_batch_without_a_traced_request_has_no_span(toy: TracedToy) -> None:
    assert await toy.complete(toy.open("ab", "")) == "abab"
    assert toy.spans() == []


async def test_a_request_that_was_cancelled_before_its_admission_has_one_span(toy: TracedToy) -> None:
    stream = toy.open("ab")
    stream.close()
    assert toy.admitter.admit([stream]) == [None]
    stream.close()
    (admission,) = toy.spans("admission")
    assert admission.links == ()
    assert len(toy.spans("admit batch")) == 1
    assert toy.spans("prefill") == []


@pytest.mark.slow
def test_both_clocks_are_read_at_one_instant_while_other_threads_compute() -> None:
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        readings = [read_clocks() for _ in range(200_000)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    offsets = [wall - instant * 1e9 for instant, wall in readings]
    assert max(offsets) - min(offsets) < 1e6
