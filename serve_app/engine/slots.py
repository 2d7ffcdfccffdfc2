"""Slots of the KV arena: which are free, which are taken."""

from __future__ import annotations

import heapq


class SlotPool:
    """Hands out slot numbers, lowest first, so that live slots stay close together.

    Decode attention reads neighbouring slots as one batch, so density is speed.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self.size = size
        self._free = list(range(size))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def taken(self) -> int:
        return len(self._taken)

    def take(self) -> int:
        slot = heapq.heappop(self._free)
        self._taken.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        self._taken.remove(slot)
        heapq.heappush(self._free, slot)

    def check(self) -> None:
        """Every slot is free or taken, never both, never neither."""
        assert len(self._free) == len(set(self._free)), f"slot free twice: {sorted(self._free)}"
        assert set(self._free) | self._taken == set(range(self.size)), "slot lost"
        assert not set(self._free) & self._taken, "slot both free and taken"
