from __future__ import annotations

from serve_app.engines.native.kv_cache import BLOCK, Copy, KVCache, Trim

A, B = list(range(4 * BLOCK)), list(range(500, 500 + 4 * BLOCK))


def used(arena: KVCache, tokens: list[int], salt: str | None = "") -> int:
    """A sequence that came, was computed whole, and left."""
    taken = arena.take(tokens, salt)
    assert taken is not None
    arena.give_back(taken[0], tokens, len(tokens))
    return taken[0]


def test_slots_are_given_until_none_is_left() -> None:
    arena = KVCache(2, 1000)
    assert [arena.take([1], ""), arena.take([2], ""), arena.take([3], "")] == [(0, 0), (1, 0), None]
    assert (arena.free, arena.taken) == (0, 2)
    arena.give_back(0, [1], 1)
    assert arena.take([3], "") == (0, 0)
    arena.check()


def test_the_same_prompt_again_is_there_but_for_its_last_token() -> None:
    arena = KVCache(2, 1000)
    slot = used(arena, A)
    assert arena.take(A, "") == (slot, 3 * BLOCK)
    assert arena.orders() == ()
    arena.check()


def test_a_conversation_goes_on_where_it_was() -> None:
    arena = KVCache(3, 1000)
    slot = used(arena, A)
    assert arena.take([*A, 7, 8, 9], "") == (slot, 4 * BLOCK)


def test_a_common_beginning_is_copied_and_stays_where_it_was() -> None:
    arena = KVCache(3, 1000)
    source = used(arena, A)
    taken = arena.take([*A[: 2 * BLOCK], *B], "")
    assert taken is not None
    slot, shared = taken
    assert (slot != source, shared) == (True, 2 * BLOCK)
    assert arena.orders() == (Copy(source, slot, 2 * BLOCK),)
    assert arena.take([*A, 1], "") == (source, 4 * BLOCK)
    arena.check()


def test_a_running_sequence_shares_what_is_computed() -> None:
    arena = KVCache(2, 1000)
    arena.take(A, "")
    assert arena.take(A, "") == (1, 0)
    arena.give_back(1, A, 0)
    arena.publish(0, A, len(A))
    assert arena.take(A, "") == (1, 3 * BLOCK)
    assert arena.orders() == (Copy(0, 1, 3 * BLOCK),)


def test_salts_do_not_share() -> None:
    arena = KVCache(3, 1000)
    taken = arena.take(A, "one")
    assert taken is not None
    arena.give_back(taken[0], A, len(A))
    other = arena.take(A, "other")
    assert other is not None
    assert other[1] == 0
    assert arena.take(A, "one") == (taken[0], 3 * BLOCK)


def test_whoever_names_no_salt_shares_nothing() -> None:
    arena = KVCache(2, 1000)
    used(arena, A, None)
    for salt in ("", None):
        taken = arena.take(A, salt)
        assert taken is not None
        assert taken[1] == 0
    arena.check()


def test_it_knows_what_could_be_shared() -> None:
    arena = KVCache(2, 1000)
    arena.take(A, "")
    assert arena.shared(A, "") == 0
    arena.publish(0, A, len(A))
    assert [arena.shared(tokens, "") for tokens in (A, [*A, 1], A[:BLOCK], B)] == [3 * BLOCK, 4 * BLOCK, 0, 0]
    assert arena.shared(A, "salt") == 0


def test_what_was_left_alone_longest_goes_first() -> None:
    arena = KVCache(2, 1000)
    first, second = used(arena, A), used(arena, B)
    assert first != second
    used(arena, A)
    taken = arena.take([9] * 40, "")
    assert taken is not None
    assert taken[0] == second


def test_memory_is_given_back_when_it_is_needed_and_not_before() -> None:
    arena = KVCache(3, 10 * BLOCK)
    first, second = used(arena, A), used(arena, B)
    assert arena.blocks == 10
    taken = arena.take([9] * BLOCK, "")
    assert taken is not None
    assert arena.orders() == (Trim(first, 0),)
    assert arena.blocks == 7
    assert arena.take(A, "") == (first, 0), "it is gone"
    assert arena.grow(taken[0], 3 * BLOCK)
    assert arena.orders() == (Trim(second, 0),)
    arena.check()


def test_who_took_a_big_slot_gives_back_what_is_too_much() -> None:
    arena = KVCache(2, 6 * BLOCK)
    big = used(arena, A)
    used(arena, [])
    assert arena.take([9] * BLOCK, "") is not None
    taken = arena.take([8] * 10, "")
    assert taken is not None
    assert taken == (big, 0)
    assert arena.blocks <= 6
    arena.check()


def test_no_memory_is_no_slot_and_a_sequence_that_cannot_grow_is_told() -> None:
    arena = KVCache(3, 4 * BLOCK)
    taken = arena.take([1] * (2 * BLOCK), "")
    assert taken is not None
    assert arena.take([2] * (2 * BLOCK), "") is None
    assert arena.take([2] * 3, "") == (1, 0)
    assert not arena.grow(taken[0], 4 * BLOCK)
    assert arena.grow(taken[0], 3 * BLOCK)
    arena.check()


def test_what_would_not_fit_beside_its_source_takes_the_sources_place() -> None:
    arena = KVCache(2, 5 * BLOCK)
    source = used(arena, A)
    assert arena.take([*A[:BLOCK], *B[: 3 * BLOCK]], "") == (source, BLOCK)
    assert arena.orders() == ()
    arena.check()


def test_what_was_dropped_is_not_shared() -> None:
    arena = KVCache(2, 1000)
    taken = arena.take(A, "")
    assert taken is not None
    arena.publish(taken[0], A, len(A))
    arena.drop(taken[0])
    again = arena.take(A, "")
    assert again is not None
    assert again[1] == 0
    arena.check()


def test_after_a_failure_memory_is_still_given_back() -> None:
    arena = KVCache(3, 1000)
    arena.undone((Copy(0, 1, 5), Trim(2, 0)))
    assert arena.orders() == (Trim(2, 0),)
