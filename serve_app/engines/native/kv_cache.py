"""What every slot of the KV arena holds, who may use it, and how much memory all of it takes.

Only the book-keeping: the runner holds the tensors. A slot is a place for one whole sequence; its memory counts in
blocks of BLOCK tokens, and only as far as it was ever written. A slot that was given back keeps its content until
somebody needs the slot or the memory, so that a prompt that begins alike need not be computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence as Seq
from dataclasses import dataclass

# Tokens that are shared, and counted, together. 32 tokens of 64 numbers in bfloat16 are one page of memory.
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `count` tokens of slot `source` go to slot `target`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Slot `slot` holds nothing from token `keep` on: its memory there can go."""

    slot: int
    keep: int


class _Content:
    """`tokens` are those of whoever uses, or used, the slot; the first `len(chain) * BLOCK` can be shared."""

    __slots__ = ("blocks", "chain", "needed", "salt", "tokens")

    def __init__(self) -> None:
        self.tokens: Seq[int] = ()
        self.salt: str | None = None
        self.chain: list[int] = []
        self.blocks = 0  # of memory that was written to since it was last given back
        self.needed = 0  # of them, while the slot is taken


class KVCache:
    """`slots` sequences, `tokens` of them all together.

    What may be shared is found by a chain of hashes, one a block, each over the block and all before it, and then
    compared token by token: a collision costs time, never an answer. Copies and trims are to be done by the runner
    before the next step, in order; `orders` hands them out. Content is shared among those who name the same salt;
    whoever names none shares nothing.
    """

    def __init__(self, slots: int, tokens: int) -> None:
        assert slots > 0
        self.size = slots
        self._limit = tokens // BLOCK
        self._contents = [_Content() for _ in range(slots)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))  # what was used last comes last
        self._index: dict[int, list[int]] = {}
        self._orders: list[Copy | Trim] = []
        self.blocks = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def taken(self) -> int:
        return self.size - len(self._free)

    def shared(self, tokens: Seq[int], salt: str) -> int:
        """How many tokens of a sequence are there already, for whoever has this salt."""
        return self._longest(tokens[:-1], salt)[1]

    def take(self, tokens: Seq[int], salt: str | None, afresh: bool = False) -> tuple[int, int] | None:
        """A free slot for a sequence, and how many of its tokens are there already: none if it begins `afresh`.

        None when all are taken, or when there is no memory for one token more than `tokens`. At least one token is
        left to compute, for its logits.
        """
        source, shared = (None, 0) if salt is None or afresh else self._longest(tokens[:-1], salt)
        needed = _blocks(len(tokens) + 1)
        for slot in self._choices(source, shared):
            missing = max(0, needed - self._contents[slot].blocks)
            if self._make_room(missing, keep={slot, slot if source is None else source}):
                self._settle(slot, source, shared, salt)
                self._write(slot, needed)
                return slot, shared
        return None

    def grow(self, slot: int, tokens: int) -> bool:
        """Room for `tokens` tokens in a taken slot; False when there is no memory for them."""
        needed = _blocks(tokens)
        if not self._make_room(needed - self._contents[slot].blocks, keep={slot}):
            return False
        self._write(slot, max(needed, self._contents[slot].needed))
        return True

    def publish(self, slot: int, tokens: Seq[int], count: int) -> None:
        """The first `count` of `tokens` are computed in this slot: from now on others may have them."""
        content = self._contents[slot]
        content.tokens = tokens
        if content.salt is None:
            return
        for hashed in list(_chain(tokens, content.salt, count // BLOCK))[len(content.chain) :]:
            content.chain.append(hashed)
            self._index.setdefault(hashed, []).append(slot)

    def give_back(self, slot: int, tokens: Seq[int], count: int) -> None:
        """The slot is free; what it holds, the first `count` of `tokens`, stays until it is in the way."""
        self.publish(slot, tokens, count)
        content = self._contents[slot]
        content.tokens, content.needed = tuple(tokens[:count]), 0
        self._free[slot] = None
        if not content.chain:
            self._free.move_to_end(slot, last=False)

    def drop(self, slot: int) -> None:
        """The slot is free, and what it holds of no use."""
        self._forget(slot, 0)
        self.give_back(slot, (), 0)

    def orders(self) -> tuple[Copy | Trim, ...]:
        """What the runner has to do before the next step."""
        orders, self._orders = tuple(self._orders), []
        return orders

    def undone(self, orders: Seq[Copy | Trim]) -> None:
        """These may not have been carried out: memory is still to be given back, copies nobody waits for any more."""
        self._orders[:0] = [order for order in orders if isinstance(order, Trim)]

    def check(self) -> None:
        """Every slot is free or taken, memory adds up, and the index says what the slots hold."""
        assert self.blocks == sum(content.blocks for content in self._contents) <= self._limit, "memory miscounted"
        for slot, content in enumerate(self._contents):
            assert content.needed <= content.blocks, "written beyond what is counted"
            assert (content.needed == 0) == (slot in self._free), "taken without need"
            chain = [] if content.salt is None else list(_chain(content.tokens, content.salt, len(content.chain)))
            assert content.chain == chain, "chain broken"
            assert all(slot in self._index[hashed] for hashed in content.chain), "content without index"
        assert sum(map(len, self._index.values())) == sum(len(c.chain) for c in self._contents), "index of nothing"

    def _longest(self, tokens: Seq[int], salt: str) -> tuple[int | None, int]:
        """The slot that shares most blocks with a sequence, and how many tokens that is."""
        source, count = None, 0
        for number, hashed in enumerate(_chain(tokens, salt, len(tokens) // BLOCK), start=1):
            if hashed not in self._index:
                break
            source, count = self._index[hashed][-1], number * BLOCK
        if source is None:
            return None, 0
        content = self._contents[source]
        if content.salt != salt or list(content.tokens[:count]) != list(tokens[:count]):
            return None, 0
        return source, count

    def _choices(self, source: int | None, shared: int) -> list[int]:
        """Free slots to try: the one that was left alone longest, so that `source` stays; then `source` itself.

        `source` comes first if it holds hardly more than what is shared.
        """
        oldest = next(iter(self._free), None)
        if oldest is None or source is None or source not in self._free:
            return [] if oldest is None else [oldest]
        alone = len(self._contents[source].chain) - shared // BLOCK <= 1
        return [source] if alone or oldest == source else [oldest, source]

    def _settle(self, slot: int, source: int | None, shared: int, salt: str | None) -> None:
        """Take a slot for a sequence that shares tokens with `source`."""
        del self._free[slot]
        if source is not None and source != slot:
            self._orders.append(Copy(source, slot, shared))
        self._forget(slot, shared // BLOCK if source == slot else 0)
        self._contents[slot].salt = salt

    def _make_room(self, blocks: int, keep: set[int]) -> bool:
        """Give memory back until `blocks` more can be written, least recently used first."""
        excess = self.blocks + blocks - self._limit
        if excess <= 0:
            return True
        givers = [(slot, 0) for slot in self._free if slot not in keep]
        givers += [(slot, c.needed) for slot, c in enumerate(self._contents) if c.needed and slot not in keep]
        if sum(self._contents[slot].blocks - needed for slot, needed in givers) < excess:
            return False
        for slot, needed in givers:
            if self.blocks + blocks <= self._limit:
                break
            self._trim(slot, needed)
        return True

    def _trim(self, slot: int, blocks: int) -> None:
        content = self._contents[slot]
        if content.blocks > blocks:
            self._forget(slot, blocks)
            self._orders.append(Trim(slot, blocks * BLOCK))
            self.blocks -= content.blocks - blocks
            content.blocks = blocks

    def _write(self, slot: int, needed: int) -> None:
        content = self._contents[slot]
        content.needed = needed
        self.blocks += max(0, needed - content.blocks)
        content.blocks = max(content.blocks, needed)

    def _forget(self, slot: int, blocks: int) -> None:
        """Nobody may have more than the first `blocks` of this slot."""
        content = self._contents[slot]
        for hashed in content.chain[blocks:]:
            slots = self._index[hashed]
            slots.remove(slot)
            if not slots:
                del self._index[hashed]
        del content.chain[blocks:]


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _chain(tokens: Seq[int], salt: str, blocks: int) -> Iterator[int]:
    """A hash for each of the first blocks, over it and all before it."""
    hashed = hash(salt)
    for start in range(0, blocks * BLOCK, BLOCK):
        hashed = hash((hashed, *tokens[start : start + BLOCK]))
        yield hashed
