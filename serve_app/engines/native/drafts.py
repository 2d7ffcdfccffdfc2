"""Guesses at what a sequence will say next, from what it said before; and the longest step that nobody will notice."""

from __future__ import annotations

from collections.abc import Sequence as Seq

_LENGTHS = (4, 3, 2)
# Below this share of right guesses a sequence rests from guessing.
_WORTH = 0.1
_REST_TOKENS = 48
_NEWEST = 0.15


class Drafter:
    """Prompt look-up: what followed the last few tokens when they came before, longest match and latest place first.

    Saxena, "Prompt lookup decoding", 2023. `learn` watches how often it is right: a text that does not repeat itself
    is left alone, and tried again after a while.
    """

    __slots__ = ("_indexed", "_next_try", "_places", "_right")

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._right = 0.5
        self._next_try = 0

    def propose(self, tokens: Seq[int], count: int) -> tuple[int, ...]:
        """At most `count` tokens that may follow `tokens`; often none."""
        if count <= 0 or len(tokens) < self._next_try:
            return ()
        for end in range(self._indexed, len(tokens)):
            for length in _LENGTHS:
                if end >= length:
                    self._places[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        for length in _LENGTHS:
            place = self._places.get(tuple(tokens[-length:]))
            if place is not None:
                return tuple(tokens[place : place + count])
        return ()

    def learn(self, proposed: int, right: int, length: int) -> None:
        """Of the last proposal, so many were right; the sequence has `length` tokens now."""
        self._right += _NEWEST * (right / proposed - self._right)
        if self._right < _WORTH:
            self._right, self._next_try = 2 * _WORTH, length + _REST_TOKENS
