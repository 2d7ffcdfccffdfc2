"""Finds how many characters at the end of a text may be the beginning of a given word."""

from __future__ import annotations


def overlap(text: str, word: str) -> int:
    """Length of the longest proper prefix of `word` that `text` ends with."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
