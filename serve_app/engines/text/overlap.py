"""Finds what two texts have in common at their ends."""

from __future__ import annotations


def overlap(text: str, word: str) -> int:
    """Length of the longest proper prefix of `word` that `text` ends with."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0


def common_prefix(one: str, other: str) -> str:
    """The longest text that both begin with."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differing, min(len(one), len(other)))]
