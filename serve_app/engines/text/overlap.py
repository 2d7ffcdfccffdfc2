"""What is asked of texts in more than one room."""

from __future__ import annotations


def overlap(text: str, word: str) -> int:
    """Length of the longest proper prefix of `word` that ends `text`: so much is held back, for what may come."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
