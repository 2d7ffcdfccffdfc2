from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from serve_app.engines.native.kv_cache import BLOCK, Copy, KVCache, Trim, block_hashes

A, B = list(range(4 * BLOCK)), list(range(500, 500 + 4 * BLOCK))


def run(cache: KVCache, tokens: list[int], salt: str | None = "") -> int:
    """The slot of a sequence that was allocated, computed completely and freed."""
    allocated = cache.allocate(tokens, salt)
    assert allocated is not None
    cache.free(allocated[0], tokens, len(tokens))
    return allocated[0]


def test_slots_are_allocated_until_none_is_free() -> None:
    cache = KVCache(2, 1000)
    assert [cache.allocate([1], ""), cache.allocate([2], ""), cache.allocate([3], "")] == [(0, 0), (1, 0), None]
    assert (cache.free_slots, cache.used_slots) == (0, 2)
    cache.free(0, [1], 1)
    assert cache.allocate([3], "") == (0, 0)
    cache.check()


def test_a_repeated_prompt_is_reused_except_for_its_last_token() -> None:
    cache = KVCache(2, 1000)
    slot = run(cache, A)
    assert cache.allocate(A, "") == (slot, 3 * BLOCK)
    assert cache.take_ops() == ()
    cache.check()


def test_a_continued_conversation_reuses_its_own_slot() -> None:
    cache = KVCache(3, 1000)
    slot = run(cache, A)
    assert cache.allocate([*A, 7, 8, 9], "") == (slot, 4 * BLOCK)


def test_a_shared_prefix_is_copied_and_stays_in_its_slot() -> None:
    cache = KVCache(3, 1000)
    source = run(cache, A)
    allocated = cache.allocate([*A[: 2 * BLOCK], *B], "")
    assert allocated is not None
    slot, shared = allocated
    assert (slot != source, shared) == (True, 2 * BLOCK)
    assert cache.take_ops() == (Copy(source, slot, 2 * BLOCK),)
    assert cache.allocate([*A, 1], "") == (source, 4 * BLOCK)
    cache.check()


def test_a_running_sequence_shares_its_computed_prompt() -> None:
    cache = KVCache(2, 1000)
    cache.allocate(A, "")
    assert cache.allocate(A, "") == (1, 0)
    cache.free(1, A, 0)
    cache.publish(0, A, len(A))
    assert cache.allocate(A, "") == (1, 3 * BLOCK)
    assert cache.take_ops() == (Copy(0, 1, 3 * BLOCK),)


def test_a_sequence_without_reuse_gets_an_empty_slot() -> None:
    cache = KVCache(2, 1000)
    run(cache, A)
    allocated = cache.allocate(A, "", reuse=False)
    assert allocated is not None
    assert allocated[1] == 0


def test_an_answer_extends_the_published_prompt_block_by_block() -> None:
    cache = KVCache(2, 1000)
    cache.allocate(A, "")
    cache.publish(0, A, len(A))
    for count in range(len(A), len(A) + len(B) + 1):
        cache.publish(0, A + B, count)
        assert cache.cached_tokens([*A, *B, 1], "") == count // BLOCK * BLOCK
        cache.check()


def test_sequences_with_different_salts_do_not_share() -> None:
    cache = KVCache(3, 1000)
    slot = run(cache, A, "one")
    other = cache.allocate(A, "other")
    assert other is not None
    assert other[1] == 0
    assert cache.allocate(A, "one") == (slot, 3 * BLOCK)


def test_a_sequence_without_salt_shares_nothing() -> None:
    cache = KVCache(2, 1000)
    run(cache, A, None)
    for salt in ("", None):
        allocated = cache.allocate(A, salt)
        assert allocated is not None
        assert allocated[1] == 0
    cache.check()


def test_cached_tokens_counts_reusable_tokens() -> None:
    cache = KVCache(2, 1000)
    cache.allocate(A, "")
    assert cache.cached_tokens(A, "") == 0
    cache.publish(0, A, len(A))
    assert [cache.cached_tokens(tokens, "") for tokens in (A, [*A, 1], A[:BLOCK], B)] == [3 * BLOCK, 4 * BLOCK, 0, 0]
    assert cache.cached_tokens(A, "salt") == 0


def test_the_least_recently_used_slot_is_replaced_first() -> None:
    cache = KVCache(2, 1000)
    first, second = run(cache, A), run(cache, B)
    assert first != second
    run(cache, A)
    allocated = cache.allocate([9] * 40, "")
    assert allocated is not None
    assert allocated[0] == second


def test_memory_is_freed_only_when_it_is_needed() -> None:
    cache = KVCache(3, 10 * BLOCK)
    first, second = run(cache, A), run(cache, B)
    assert cache.blocks == 10
    allocated = cache.allocate([9] * BLOCK, "")
    assert allocated is not None
    assert cache.take_ops() == (Trim(first, 0),)
    assert cache.blocks == 7
    assert cache.allocate(A, "") == (first, 0), "the content of the first slot was freed"
    assert cache.grow(allocated[0], 3 * BLOCK)
    assert cache.take_ops() == (Trim(second, 0),)
    cache.check()


def test_a_used_slot_gives_back_memory_that_its_sequence_does_not_need() -> None:
    cache = KVCache(2, 6 * BLOCK)
    big = run(cache, A)
    run(cache, [])
    assert cache.allocate([9] * BLOCK, "") is not None
    assert cache.allocate([8] * 10, "") == (big, 0)
    assert cache.blocks <= 6
    cache.check()


def test_without_memory_no_slot_is_allocated_and_no_sequence_grows() -> None:
    cache = KVCache(3, 4 * BLOCK)
    allocated = cache.allocate([1] * (2 * BLOCK), "")
    assert allocated is not None
    assert cache.allocate([2] * (2 * BLOCK), "") is None
    assert cache.allocate([2] * 3, "") == (1, 0)
    assert not cache.grow(allocated[0], 4 * BLOCK)
    assert cache.grow(allocated[0], 3 * BLOCK)
    cache.check()


def test_a_sequence_that_does_not_fit_beside_its_source_overwrites_it() -> None:
    cache = KVCache(2, 5 * BLOCK)
    source = run(cache, A)
    assert cache.allocate([*A[:BLOCK], *B[: 3 * BLOCK]], "") == (source, BLOCK)
    assert cache.take_ops() == ()
    cache.check()


def test_discarded_content_is_not_shared() -> None:
    cache = KVCache(2, 1000)
    allocated = cache.allocate(A, "")
    assert allocated is not None
    cache.publish(allocated[0], A, len(A))
    cache.discard(allocated[0])
    again = cache.allocate(A, "")
    assert again is not None
    assert again[1] == 0
    cache.check()


def test_the_trims_of_a_failed_step_are_scheduled_again() -> None:
    cache = KVCache(3, 1000)
    cache.restore_trims((Copy(0, 1, 5), Trim(2, 0)))
    assert cache.take_ops() == (Trim(2, 0),)


# Block hashes

HASH_IN_ANOTHER_PROCESS = """
from serve_app.engines.native.kv_cache import BLOCK, block_hashes
print(*(block_hash.hex() for block_hash in block_hashes("s\\u00e4lt", list(range(100_000, 100_000 + 3 * BLOCK)))))
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_block_hashes_are_equal_in_every_process(seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", HASH_IN_ANOTHER_PROCESS]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split() == [h.hex() for h in block_hashes("sält", list(range(100_000, 100_000 + 3 * BLOCK)))]


def test_block_hashes_do_not_change_between_releases() -> None:
    expected = ["e1e4d8c834f34dd5a595efbd09df7960", "df63f3b0e92a046da429a81cf4602f8a"]
    assert [h.hex() for h in block_hashes("salt", list(range(64)))] == expected


def test_a_block_hash_covers_the_salt_and_all_tokens_up_to_its_block() -> None:
    base = block_hashes("", A)
    assert len(set(base)) == 4
    assert block_hashes("", A[: 3 * BLOCK - 1]) == base[:2], "only whole blocks have a hash"
    assert not set(block_hashes("other", A)) & set(base)
    for changed in range(len(A)):
        tokens = [*A[:changed], 2**31, *A[changed + 1 :]]
        hashes = block_hashes("", tokens)
        assert [a == b for a, b in zip(base, hashes, strict=True)] == [n < changed // BLOCK for n in range(4)]


@given(st.text(st.characters(exclude_categories=())))
def test_every_salt_that_json_can_carry_has_a_hash(salt: str) -> None:
    """JSON can carry lone surrogates, which UTF-8 cannot encode."""
    assert len(block_hashes(salt, A)) == 4
