"""An ingress decodes the chunks and errors that a replica packed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from serve_app.core.events import (
    Chunk,
    FinishReason,
    Logprobs,
    PromptDetails,
    ReasoningDelta,
    TextDelta,
    TextToken,
    TokenEvent,
    TokenLogprob,
    ToolCallDelta,
)
from serve_app.deployments import wire
from serve_app.errors import InternalError, QueueFull, ServeAppError
from tests.gateway.scripted import request

ids = st.integers(0, 2**31 - 1)
numbers = st.floats(allow_nan=False, width=64)
text = st.text(max_size=8)
logprob = st.builds(TokenLogprob, ids, text, numbers)
logprobs = st.builds(Logprobs, logprob, st.lists(logprob, max_size=3).map(tuple), st.none() | ids)
delta = st.builds(TextDelta, text) | st.builds(ReasoningDelta, text) | st.builds(ToolCallDelta, ids, text, text)
event = st.builds(
    TokenEvent,
    ids,
    text,
    numbers,
    st.none() | st.sampled_from(FinishReason),
    st.none() | logprobs,
    st.none() | text | ids,
    st.none() | st.lists(delta, max_size=2).map(tuple),
)
details = st.builds(
    PromptDetails,
    st.lists(st.builds(TextToken, ids, text, ids, ids), max_size=3).map(tuple),
    text,
    st.lists(logprobs, max_size=2).map(tuple),
)
chunks = st.builds(
    Chunk,
    st.lists(event, max_size=3).map(tuple),
    ids,
    numbers,
    ids,
    st.none() | details,
    st.none() | st.lists(numbers, max_size=3).map(tuple),
    st.integers(0, 2**63 - 1),
)


def transmit(items: list[tuple[int, wire.Item]]) -> list[wire.Packed]:
    frame = wire.pack(items)
    (length,) = wire.LENGTH.unpack_from(frame)
    assert length == len(frame) - wire.LENGTH.size
    return wire.unpack(frame[wire.LENGTH.size :])


@pytest.mark.slow
@given(st.lists(st.tuples(ids, chunks), max_size=4))
def test_chunks_arrive_as_they_were_sent(items: list[tuple[int, wire.Item]]) -> None:
    arrived = transmit(items)
    assert [(one.stream, wire.decode(one)) for one in arrived] == items
    assert [wire.expanded(wire.compact(one)) for one in arrived] == arrived


@given(chunks, st.floats(0, 10))
def test_an_offset_is_added_to_every_time(chunk: Chunk, offset_s: float) -> None:
    (packed,) = transmit([(1, chunk)])
    events = tuple(replace(event, elapsed_s=event.elapsed_s + offset_s) for event in chunk.events)
    assert wire.decode(packed, offset_s) == replace(chunk, events=events, queue_s=chunk.queue_s + offset_s)
    assert packed.elapsed_s == (chunk.events[-1].elapsed_s if chunk.events else None)


@pytest.mark.parametrize("kind", ServeAppError.__subclasses__())
def test_errors_keep_their_type_and_fields(kind: type[ServeAppError]) -> None:
    (packed,) = transmit([(1, kind("message", "param", 2.5))])
    found = wire.decode(packed)
    assert type(found) is kind
    assert isinstance(found, ServeAppError)
    assert (found.message, found.param, found.retry_after_s) == ("message", "param", 2.5)


def test_an_error_of_an_unknown_kind_is_an_internal_error() -> None:
    (packed,) = transmit([(1, QueueFull("x"))])
    packed.fields[0] = "from a newer version"
    assert isinstance(wire.decode(packed), InternalError)


def test_a_text_with_half_a_surrogate_pair_passes() -> None:
    chunk = Chunk((TokenEvent(1, "\ud83d", math.inf),), 1, 0.0)
    assert wire.decode(transmit([(1, chunk)])[0]) == chunk


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93\x01\x02", b"\x91\x01", b"\x01"])
def test_bytes_that_are_not_a_frame_raise_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a frame"):
        wire.unpack(body)


def test_a_requests_instants_are_converted_to_the_receivers_clock() -> None:
    sent_request = request(timeout_s=30)
    received = wire.incoming(wire.outgoing(sent_request, sent_request.arrived + 2), 1000.0)
    assert received.arrived == pytest.approx(998)
    assert received.deadline == pytest.approx(1028)
