from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from serve_app.engine.slots import SlotPool


@given(st.integers(1, 8), st.lists(st.integers(0, 7)))
def test_after_any_history_every_slot_is_free_or_taken_and_the_lowest_goes_first(size: int, history: list[int]) -> None:
    pool, taken = SlotPool(size), set[int]()
    for choice in history:
        if choice in taken:
            pool.give_back(choice)
            taken.remove(choice)
        elif pool.free:
            lowest = min(set(range(size)) - taken)
            assert pool.take() == lowest
            taken.add(lowest)
        pool.check()
        assert (pool.free, pool.taken) == (size - len(taken), len(taken))
    for slot in taken:
        pool.give_back(slot)
    assert [pool.take() for _ in range(size)] == list(range(size))


def test_a_slot_is_not_given_back_twice() -> None:
    pool = SlotPool(2)
    slot = pool.take()
    pool.give_back(slot)
    with pytest.raises(KeyError):
        pool.give_back(slot)


def test_there_is_no_slot_beyond_the_last() -> None:
    pool = SlotPool(1)
    pool.take()
    with pytest.raises(IndexError):
        pool.take()


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError):
        SlotPool(0)
