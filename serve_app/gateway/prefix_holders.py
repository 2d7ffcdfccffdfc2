"""Which replicas have computed which blocks of prompts."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

# Replicas that are found for each block of a prompt, and for a whole prompt.
_PER_BLOCK = 8
_MOST_HOLDERS = 24


class PrefixHolders:
    """The replicas that hold each block, by the block's digest. The caller holds a lock."""

    def __init__(self, random: random.Random) -> None:
        self._of: dict[int, set[str]] = {}
        self._random = random

    def hold(self, replica: str, digests: set[int]) -> None:
        for digest in digests:
            self._of.setdefault(digest, set()).add(replica)

    def drop(self, replica: str, digests: set[int]) -> None:
        for digest in digests:
            holders = self._of.get(digest)
            if holders is not None:
                holders.discard(replica)
                if not holders:
                    del self._of[digest]

    def matched(self, digests: Sequence[int], allowed: Collection[str]) -> dict[str, int]:
        """The number of leading blocks that replicas have, for the replicas with most of them."""
        found: dict[str, int] = {}
        for count in range(len(digests), 0, -1):
            holders = self._of.get(digests[count - 1])
            if not holders:
                continue
            few = holders if len(holders) <= _PER_BLOCK else self._random.sample(tuple(holders), _PER_BLOCK)
            for replica in few:
                if replica in allowed:
                    found.setdefault(replica, count)
            if len(found) >= _MOST_HOLDERS or len(found) == len(allowed):
                break
        return found
