"""Draft tokens for speculative decoding, looked up in the sequence's own text."""

from __future__ import annotations

from collections.abc import Sequence as Seq

_NGRAMS = (4, 3, 2)
# Below this acceptance rate a sequence proposes no drafts for some tokens.
_MIN_ACCEPTANCE = 0.1
_PAUSE_TOKENS = 48
# Weight of the newest proposal in the moving average of the acceptance rate.
_NEWEST = 0.15


class Drafter:
    """Proposes the tokens that followed the last few tokens when they occurred before.

    Prompt lookup decoding (Saxena, 2023): the longest n-gram first, and its latest occurrence. `record` tracks the
    acceptance rate. While a text does not repeat itself, the drafter pauses and tries again later.
    """

    __slots__ = ("_acceptance", "_indexed", "_next_try", "_places")

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._acceptance = 0.5
        self._next_try = 0

    def propose(self, tokens: Seq[int], count: int) -> tuple[int, ...]:
        """At most `count` tokens that may follow `tokens`; often none."""
        if count <= 0 or len(tokens) < self._next_try:
            return ()
        for end in range(self._indexed, len(tokens)):
            for length in _NGRAMS:
                if end >= length:
                    self._places[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        for length in _NGRAMS:
            place = self._places.get(tuple(tokens[-length:]))
            if place is not None:
                return tuple(tokens[place : place + count])
        return ()

    def record(self, proposed: int, accepted: int, length: int) -> None:
        """Learn that `accepted` of the last `proposed` drafts were right; the sequence has `length` tokens now."""
        self._acceptance += _NEWEST * (accepted / proposed - self._acceptance)
        if self._acceptance < _MIN_ACCEPTANCE:
            self._acceptance, self._next_try = 2 * _MIN_ACCEPTANCE, length + _PAUSE_TOKENS
