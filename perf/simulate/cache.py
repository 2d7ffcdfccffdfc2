"""The prefix cache of a simulated replica: whole blocks, of which the one that was not used for longest is freed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """Holds at most `capacity` blocks by their digests."""

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def matched(self, digests: Sequence[int]) -> int:
        """The number of leading blocks that are held."""
        blocks = self._blocks
        return next((n for n, digest in enumerate(digests) if digest not in blocks), len(digests))

    def add(self, digests: Sequence[int]) -> None:
        """The last block becomes the first one of these to be freed."""
        blocks = self._blocks
        for digest in reversed(digests):
            blocks[digest] = None
            blocks.move_to_end(digest)
        while len(blocks) > self._capacity:
            blocks.popitem(last=False)
