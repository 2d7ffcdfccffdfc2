"""Bookkeeping of the KV cache: the content of each slot, the sequences that can reuse it, and the memory in use.

The runner holds the tensors. A slot holds one whole sequence. Its memory is counted in blocks of BLOCK tokens, and only
blocks that were written count. A freed slot keeps its content until the slot or its memory is needed, so that the next
prompt with the same beginning does not compute that beginning again.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

# Tokens that are shared, and counted, together. 32 tokens of 64 numbers in bfloat16 are one page of memory.
BLOCK = 32
_HASH_BYTES = 16
# Blocks that a lookup hashes together. After a group without a match it hashes no more.
_GROUP = 8


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the first `count` tokens of slot `source` to slot `target`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Free the memory of slot `slot` from token `keep` on."""

    slot: int
    keep: int


CacheOp = Copy | Trim


class _Slot:
    """The content of one slot. Other sequences can reuse its first `published` blocks.

    `tokens` are the tokens of the sequence that uses, or last used, the slot, and `hashes` the hashes of its first
    blocks as far as they were needed. `written` is the number of blocks that take memory; `reserved` of them belong
    to the sequence that uses the slot, 0 in a free slot.
    """

    __slots__ = ("hashes", "published", "reserved", "salt", "tokens", "written")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.salt: str | None = None
        self.hashes: list[bytes] = []
        self.published = 0
        self.written = 0
        self.reserved = 0


class KVCache:
    """A cache of `slots` sequences that hold at most `tokens` tokens together.

    `allocate` finds reusable content by the hashes of its blocks and then compares the tokens themselves, so that a
    hash collision costs time but never a wrong answer. Sequences share content if their salts are equal; a sequence
    with salt None shares nothing. The runner executes the copies and trims of `take_ops`, in order, before the next
    step.
    """

    def __init__(self, slots: int, tokens: int) -> None:
        assert slots > 0
        self.size = slots
        self._max_blocks = tokens // BLOCK
        self._slots = [_Slot() for _ in range(slots)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))  # least recently used first
        self._index: dict[bytes, list[int]] = {}
        self._ops: list[CacheOp] = []
        self.blocks = 0

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def used_slots(self) -> int:
        return self.size - len(self._free)

    def cached_tokens(self, tokens: list[int], salt: str) -> int:
        """The number of leading tokens of a sequence that a slot with this salt holds."""
        return self._longest_match(tokens, salt)[1]

    def allocate(self, tokens: list[int], salt: str | None, reuse: bool = True) -> tuple[int, int] | None:
        """A slot for a sequence, and the number of its tokens that the slot holds: 0 without `reuse`.

        None if no slot is free, or if the memory does not hold one token more than `tokens`. At least one token is
        left to compute, because its logits are needed.
        """
        source, shared, hashes = self._longest_match(tokens, salt) if reuse and salt is not None else (None, 0, [])
        needed = _blocks(len(tokens) + 1)
        for slot in self._candidates(source, shared):
            missing = max(0, needed - self._slots[slot].written)
            if self._reclaim(missing, keep=(slot, source)):
                self._assign(slot, source, shared, salt)
                self._slots[slot].hashes = hashes
                self._reserve(slot, needed)
                return slot, shared
        return None

    def grow(self, slot: int, tokens: int) -> bool:
        """Reserve memory for `tokens` tokens in a used slot; False if there is not enough."""
        needed = _blocks(tokens)
        if not self._reclaim(needed - self._slots[slot].written, keep=(slot,)):
            return False
        self._reserve(slot, max(needed, self._slots[slot].reserved))
        return True

    def publish(self, slot: int, tokens: list[int], count: int) -> None:
        """Let other sequences reuse the first `count` of `tokens`, which are computed in this slot."""
        state = self._slots[slot]
        state.tokens = tokens
        if state.salt is None:
            return
        blocks = count // BLOCK
        if len(state.hashes) < blocks:
            state.hashes += _hash_blocks(state.hashes, state.salt, tokens, blocks)
        for block_hash in state.hashes[state.published : blocks]:
            self._index.setdefault(block_hash, []).append(slot)
        state.published = max(state.published, blocks)

    def free(self, slot: int, tokens: list[int], count: int) -> None:
        """Free the slot. Its content, the first `count` of `tokens`, stays until its memory is needed."""
        self.publish(slot, tokens, count)
        state = self._slots[slot]
        state.tokens, state.reserved = tokens[:count], 0
        del state.hashes[state.published :]
        self._free[slot] = None
        if not state.published:
            self._free.move_to_end(slot, last=False)

    def discard(self, slot: int) -> None:
        """Free the slot and forget its content."""
        self._unpublish(slot, 0)
        self.free(slot, [], 0)

    def take_ops(self) -> tuple[CacheOp, ...]:
        """The copies and trims that the runner has to execute before the next step."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def restore_trims(self, ops: Seq[CacheOp]) -> None:
        """Schedule the trims of a failed step again: the runner may not have executed them."""
        self._ops[:0] = [op for op in ops if isinstance(op, Trim)]

    def check(self) -> None:
        """Assert every invariant. Hashes all cached blocks again, so that only tests call it."""
        assert self.blocks == sum(state.written for state in self._slots) <= self._max_blocks, "wrong block count"
        for slot, state in enumerate(self._slots):
            assert state.reserved <= state.written, "more blocks reserved than written"
            assert (state.reserved == 0) == (slot in self._free), "used slot without reserved blocks"
            published = state.tokens[: state.published * BLOCK]
            hashes = [] if state.salt is None else block_hashes(state.salt, published)
            assert state.hashes[: state.published] == hashes, "hashes do not match the tokens"
            assert all(slot in self._index[block_hash] for block_hash in hashes), "block missing from the index"
        assert sum(map(len, self._index.values())) == sum(s.published for s in self._slots), "stale index entry"

    def _longest_match(self, tokens: list[int], salt: str) -> tuple[int | None, int, list[bytes]]:
        """The slot that holds most leading blocks of a sequence, their number of tokens, and the hashes computed.

        The block of the last token is left out.
        """
        blocks, matched = (len(tokens) - 1) // BLOCK, 0
        hashes: list[bytes] = []
        while matched == len(hashes) < blocks:
            hashes += _hash_blocks(hashes, salt, tokens, min(matched + _GROUP, blocks))
            while matched < len(hashes) and hashes[matched] in self._index:
                matched += 1
        if not matched:
            return None, 0, hashes
        source, count = self._index[hashes[matched - 1]][-1], matched * BLOCK
        state = self._slots[source]
        if state.salt != salt or state.tokens[:count] != tokens[:count]:
            return None, 0, []
        return source, count, hashes

    def _candidates(self, source: int | None, shared: int) -> list[int]:
        """Free slots to try: first the least recently used one, so that `source` stays, then `source` itself.

        `source` comes first if it holds at most one block more than the shared ones.
        """
        oldest = next(iter(self._free), None)
        if oldest is None or source is None or source not in self._free:
            return [] if oldest is None else [oldest]
        overwrite = self._slots[source].published - shared // BLOCK <= 1
        return [source] if overwrite or oldest == source else [oldest, source]

    def _assign(self, slot: int, source: int | None, shared: int, salt: str | None) -> None:
        """Take a free slot for a sequence that shares tokens with `source`."""
        del self._free[slot]
        if source is not None and source != slot:
            self._ops.append(Copy(source, slot, shared))
        self._unpublish(slot, shared // BLOCK if source == slot else 0)
        self._slots[slot].salt = salt

    def _reclaim(self, blocks: int, keep: tuple[int | None, ...]) -> bool:
        """Free memory until `blocks` more can be written, from the least recently used slot on."""
        excess = self.blocks + blocks - self._max_blocks
        if excess <= 0:
            return True
        donors = [(slot, 0) for slot in self._free if slot not in keep]
        donors += [(slot, s.reserved) for slot, s in enumerate(self._slots) if s.reserved and slot not in keep]
        if sum(self._slots[slot].written - reserved for slot, reserved in donors) < excess:
            return False
        for slot, reserved in donors:
            if self.blocks + blocks <= self._max_blocks:
                break
            self._trim(slot, reserved)
        return True

    def _trim(self, slot: int, blocks: int) -> None:
        state = self._slots[slot]
        if state.written > blocks:
            self._unpublish(slot, blocks)
            self._ops.append(Trim(slot, blocks * BLOCK))
            self.blocks -= state.written - blocks
            state.written = blocks

    def _reserve(self, slot: int, blocks: int) -> None:
        state = self._slots[slot]
        state.reserved = blocks
        self.blocks += max(0, blocks - state.written)
        state.written = max(state.written, blocks)

    def _unpublish(self, slot: int, blocks: int) -> None:
        """Remove all but the first `blocks` of this slot from the index."""
        state = self._slots[slot]
        for block_hash in state.hashes[blocks : state.published]:
            slots = self._index[block_hash]
            slots.remove(slot)
            if not slots:
                del self._index[block_hash]
        state.published = min(state.published, blocks)


def block_hashes(salt: str, tokens: list[int]) -> list[bytes]:
    """The hash of each whole block of `tokens`, over the salt, the block and all blocks before it; 16 bytes each.

    Equal in every process and on every machine, so that replicas of one model with the same BLOCK can compare their
    caches by them: BLAKE2b over the block's token ids as little-endian uint32, chained through BLAKE2b's salt
    parameter, which starts as the hash of the UTF-8 salt.
    """
    return _hash_blocks([], salt, tokens, len(tokens) // BLOCK)


@lru_cache(maxsize=64)
def _root(salt: str) -> bytes:
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=_HASH_BYTES).digest()


def _hash_blocks(known: list[bytes], salt: str, tokens: list[int], blocks: int) -> list[bytes]:
    """The hashes of the blocks after the `known` ones, up to `blocks` in all."""
    ids = array("I", tokens[len(known) * BLOCK : blocks * BLOCK])
    if sys.byteorder == "big":
        ids.byteswap()
    data, size = ids.tobytes(), BLOCK * ids.itemsize
    parent, hashes = known[-1] if known else _root(salt), []
    for start in range(0, len(data), size):
        # A block fills one compression of BLAKE2b; the parent in front of it would need a second one.
        parent = blake2b(data[start : start + size], digest_size=_HASH_BYTES, salt=parent).digest()
        hashes.append(parent)
    return hashes


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
