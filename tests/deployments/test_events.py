"""Replicas send events to an ingress over real sockets."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest

from serve_app.core.events import Chunk
from serve_app.deployments import wire
from serve_app.deployments.event_receiver import EventReceiver, Inbox
from serve_app.deployments.event_sender import Connection, EventSender
from serve_app.errors import NotReady, QueueFull
from tests.gateway.scripted import LAST, chunk


@pytest.fixture
async def receiver() -> AsyncIterator[EventReceiver]:
    receiver = EventReceiver("127.0.0.1")
    await receiver.start()
    yield receiver
    receiver.stop()


@pytest.fixture
async def sender() -> AsyncIterator[EventSender]:
    sender = EventSender(0.02)
    yield sender
    sender.stop()


async def receive(inbox: Inbox) -> wire.Item:
    async with asyncio.timeout(5):
        return await inbox.get()


@dataclass
class ScriptedStream:
    """A stream whose items are put into it by the test."""

    on_wake: Callable[[], None] | None = None
    items: list[wire.Item] = field(default_factory=list)
    ended: bool = False

    def take(self) -> wire.Item | None:
        return self.items.pop(0) if self.items else None

    def wake(self, *items: wire.Item, last: bool = False) -> None:
        self.items += items
        self.ended = last
        assert self.on_wake is not None
        self.on_wake()


def texts(items: Iterable[wire.Item]) -> list[str]:
    return [event.text for item in items if isinstance(item, Chunk) for event in item.events]


async def test_items_reach_the_inbox_of_their_stream_in_order(receiver: EventReceiver, sender: EventSender) -> None:
    now = time.monotonic()
    (one, first), (two, second) = receiver.open(now), receiver.open(now)
    connection = await sender.connection(receiver.address)
    connection.put(one, chunk("a"))
    connection.put(two, QueueFull("full", retry_after_s=2))
    connection.put(one, LAST)
    assert texts([await receive(first), await receive(first)]) == ["a", "z"]
    refused = await receive(second)
    assert isinstance(refused, QueueFull)
    assert refused.retry_after_s == 2


async def test_items_that_are_not_read_wait_in_order_and_in_little_memory(
    receiver: EventReceiver, sender: EventSender
) -> None:
    """What a client does not read takes about 100 bytes per token."""
    number, inbox = receiver.open(time.monotonic())
    connection = await sender.connection(receiver.address)
    connection.put(number, chunk("begin"))
    await receive(inbox)
    tracemalloc.start()
    for count in range(5_000):
        connection.put(number, chunk(f"{count} "))
    while len(inbox.items) < 5_000:  # noqa: ASYNC110 (nothing else says so)
        await asyncio.sleep(0.01)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 5_000 < 200
    assert texts([await receive(inbox) for _ in range(5_000)]) == [f"{count} " for count in range(5_000)]


async def test_a_replica_has_one_connection_to_an_ingress(receiver: EventReceiver, sender: EventSender) -> None:
    both = await asyncio.gather(sender.connection(receiver.address), sender.connection(receiver.address))
    assert both[0] is both[1]
    assert await sender.connection(receiver.address) is both[0]


class CountingReceiver(EventReceiver):
    frames = 0

    def received(self, items: list[wire.Packed], connection: asyncio.Transport) -> None:
        self.frames += 1
        super().received(items, connection)


async def test_the_first_tokens_of_a_step_are_one_frame_at_once(sender: EventSender) -> None:
    receiver = CountingReceiver("127.0.0.1")
    await receiver.start()
    connection = await sender.connection(receiver.address)
    streams = [(ScriptedStream(), *receiver.open(time.monotonic())) for _ in range(32)]
    for stream, number, _ in streams:
        connection.attach(number, stream)
    began = time.monotonic()
    for stream, _, _ in streams:
        stream.wake(chunk("a"))
    for _, _, inbox in streams:
        await receive(inbox)
    assert receiver.frames == 1
    assert time.monotonic() - began < 1
    receiver.stop()


async def two_begun_streams(
    receiver: EventReceiver, sender: EventSender
) -> tuple[Connection, tuple[ScriptedStream, Inbox], tuple[ScriptedStream, Inbox]]:
    """Streams 1 and 2 of a receiver that starts here; their first tokens, "a" and "A", are on their way."""
    await receiver.start()
    connection = await sender.connection(receiver.address)
    streams = (ScriptedStream(), ScriptedStream())
    inboxes = []
    for stream, text in zip(streams, "aA", strict=True):
        number, inbox = receiver.open(time.monotonic())
        connection.attach(number, stream)
        stream.wake(chunk(text))
        inboxes.append(inbox)
    return connection, (streams[0], inboxes[0]), (streams[1], inboxes[1])


async def test_later_tokens_of_all_streams_are_gathered_for_the_flush_interval() -> None:
    receiver, sender = CountingReceiver("127.0.0.1"), EventSender(0.2)
    _, (one, inbox), (two, other) = await two_begun_streams(receiver, sender)
    assert texts([await receive(inbox), await receive(other)]) == ["a", "A"]
    began = time.monotonic()
    for text in "bcd":
        one.wake(chunk(text))
        two.wake(chunk(text.upper()))
        await asyncio.sleep(0.01)
    assert texts([await receive(inbox) for _ in range(3)]) == ["b", "c", "d"]
    assert texts([await receive(other) for _ in range(3)]) == ["B", "C", "D"]
    assert receiver.frames == 2
    assert 0.1 < time.monotonic() - began < 1
    sender.stop()
    receiver.stop()


async def test_the_end_of_a_stream_is_sent_at_once_with_what_the_others_have() -> None:
    receiver, sender = CountingReceiver("127.0.0.1"), EventSender(60)
    connection, (one, inbox), (two, other) = await two_begun_streams(receiver, sender)
    await asyncio.gather(receive(inbox), receive(other))
    two.wake(chunk("B"))
    one.wake(LAST, last=True)
    assert texts([await receive(inbox), await receive(other)]) == ["z", "B"]
    connection.detach(1)
    assert one.on_wake is None
    sender.stop()
    receiver.stop()


async def test_times_count_from_the_arrival_at_the_ingress(receiver: EventReceiver, sender: EventSender) -> None:
    """The replica saw the request 0.2 s later, and made its token 0.1 s after that."""
    number, inbox = receiver.open(time.monotonic() - 0.3)
    connection = await sender.connection(receiver.address)
    connection.put(number, chunk("a"))
    connection.put(number, replace(LAST, events=(replace(LAST.events[0], elapsed_s=0.5),)))
    first, last = await receive(inbox), await receive(inbox)
    assert not isinstance(first, Exception)
    assert not isinstance(last, Exception)
    offset = first.events[0].elapsed_s - 0.1
    assert 0.2 <= offset < 1
    assert last.events[0].elapsed_s == pytest.approx(0.5 + offset)
    assert first.queue_s == pytest.approx(offset)


async def test_a_lost_replica_ends_its_streams_and_no_others(receiver: EventReceiver, sender: EventSender) -> None:
    other = EventSender(0.02)
    now = time.monotonic()
    (one, lost), (two, kept) = receiver.open(now), receiver.open(now)
    connection = await sender.connection(receiver.address)
    healthy = await other.connection(receiver.address)
    connection.put(one, chunk("a"))
    healthy.put(two, chunk("a"))
    await receive(lost)
    await receive(kept)
    connection.close()
    assert isinstance(await receive(lost), NotReady)
    healthy.put(two, LAST)
    assert await receive(kept) != chunk("a")
    other.stop()


async def test_items_of_a_closed_stream_are_dropped(receiver: EventReceiver, sender: EventSender) -> None:
    (gone, _), (number, inbox) = receiver.open(time.monotonic()), receiver.open(time.monotonic())
    receiver.close(gone)
    connection = await sender.connection(receiver.address)
    connection.put(gone, LAST)
    connection.put(number, LAST)
    await receive(inbox)
    assert list(receiver._inboxes) == [number]


async def test_a_connection_without_the_secret_is_closed(receiver: EventReceiver) -> None:
    number, inbox = receiver.open(time.monotonic())
    reader, writer = await asyncio.open_connection(receiver.address.host, receiver.address.port)
    writer.write(bytes(32) + wire.pack([(number, LAST)]))
    async with asyncio.timeout(5):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    assert not inbox.items
    writer.close()


@pytest.mark.parametrize("frame", [b"\x00\x00\x00\x01\xc1", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\x91\x01"])
async def test_a_frame_that_cannot_be_read_closes_the_connection(receiver: EventReceiver, frame: bytes) -> None:
    reader, writer = await asyncio.open_connection(receiver.address.host, receiver.address.port)
    writer.write(receiver.address.secret + frame)
    async with asyncio.timeout(5):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    writer.close()


async def test_frames_are_joined_from_parts_of_any_size(receiver: EventReceiver) -> None:
    number, inbox = receiver.open(time.monotonic())
    _, writer = await asyncio.open_connection(receiver.address.host, receiver.address.port)
    data = receiver.address.secret + wire.pack([(number, chunk("a"))]) + wire.pack([(number, LAST)])
    for at in range(0, len(data), 7):
        writer.write(data[at : at + 7])
        await writer.drain()
        await asyncio.sleep(0.001)
    assert texts([await receive(inbox), await receive(inbox)]) == ["a", "z"]
    writer.close()


async def test_an_unreachable_ingress_raises_an_error_at_once(receiver: EventReceiver, sender: EventSender) -> None:
    address = receiver.address
    receiver.stop()
    with pytest.raises(OSError):
        await sender.connection(address)
    with pytest.raises(OSError):
        await sender.connection(address)


async def test_a_new_connection_replaces_a_closed_one(receiver: EventReceiver, sender: EventSender) -> None:
    first: Connection = await sender.connection(receiver.address)
    first.close()
    second = await sender.connection(receiver.address)
    assert second is not first
    number, inbox = receiver.open(time.monotonic())
    second.put(number, LAST)
    await receive(inbox)
