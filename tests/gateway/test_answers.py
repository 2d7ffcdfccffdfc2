"""Answers are stored as they were, within the limits of size and age."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings, strategies as st

from serve_app.core.events import Chunk
from serve_app.gateway.answers import AnswerEncoder, MemoryStore, replay
from tests.deployments.test_wire import chunks
from tests.gateway.scripted import request


class Store(MemoryStore):
    """A store whose clock a test sets. `size` is the size that it reported last."""

    def __init__(self, max_bytes: int = 10_000, ttl_s: float = 60) -> None:
        self.now = 0.0
        self.size = 0
        super().__init__(max_bytes, ttl_s, self._keep, lambda: self.now)

    def _keep(self, size: int) -> None:
        self.size = size


def without_times(chunk: Chunk) -> Chunk:
    events = tuple(replace(event, elapsed_s=0.0) for event in chunk.events)
    return replace(chunk, events=events, queue_s=0.0, began_ns=0, replayed=True)


@given(st.lists(chunks, min_size=1, max_size=4))
async def test_a_replayed_answer_is_equal_but_for_its_times(answer: list[Chunk]) -> None:
    encoder = AnswerEncoder(10**6)
    for chunk in answer:
        encoder.add(chunk)
    encoded = encoder.result()
    assert encoded is not None
    found = [chunk async for chunk in replay(encoded, request())]
    assert [without_times(chunk) for chunk in found] == [without_times(chunk) for chunk in answer]
    assert all(chunk.replayed for chunk in found)


async def test_the_least_recently_used_answer_is_removed_first() -> None:
    store = Store(max_bytes=4000)
    for key in (b"1", b"2", b"3"):
        await store.put(key, bytes(1000))
    assert await store.get(b"1") is not None
    await store.put(b"4", bytes(1000))
    assert [await store.get(key) is not None for key in (b"1", b"2", b"3", b"4")] == [True, False, True, True]


async def test_an_answer_expires_and_its_use_does_not_prolong_it() -> None:
    store = Store(ttl_s=60)
    await store.put(b"1", b"x")
    store.now = 59
    assert await store.get(b"1") == b"x"
    assert store.size > 0
    store.now = 60
    assert await store.get(b"1") is None
    assert store.size == 0


async def test_an_answer_that_is_stored_again_replaces_the_first_and_is_new() -> None:
    store = Store(ttl_s=60)
    await store.put(b"1", b"x" * 100)
    store.now = 59
    await store.put(b"1", b"y")
    store.now = 61
    assert await store.get(b"1") == b"y"
    assert store.size < 400


async def test_an_answer_above_the_size_of_the_store_is_not_kept_and_removes_nothing() -> None:
    store = Store(max_bytes=2000)
    await store.put(b"1", bytes(1000))
    await store.put(b"2", bytes(5000))
    assert (await store.get(b"1"), await store.get(b"2")) == (bytes(1000), None)


steps = st.tuples(st.sampled_from(["get", "put", "wait"]), st.integers(0, 9), st.integers(0, 3000))


@settings(max_examples=50)
@given(st.lists(steps, max_size=60))
async def test_the_size_is_the_sum_of_the_answers_and_never_above_the_limit(
    actions: list[tuple[str, int, int]],
) -> None:
    store = Store(max_bytes=5000, ttl_s=10)
    latest: dict[bytes, bytes] = {}
    for action, number, size in actions:
        key = bytes([number])
        if action == "wait":
            store.now += number
        elif action == "put":
            latest[key] = bytes([number]) * size
            await store.put(key, latest[key])
        else:
            assert await store.get(key) in (None, latest.get(key))
        entries = store._entries
        assert store.size == sum(len(answer) + 300 for _, answer in entries.values()) <= 5000
