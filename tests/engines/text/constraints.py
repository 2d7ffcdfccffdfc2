"""Helpers that follow a constraint token by token."""

from __future__ import annotations

import random

from serve_app.core.requests import Grammar, TextPrompt
from serve_app.engines.text.grammar import Constraint
from serve_app.engines.text.tokenizer import HFText


def new_constraint(text: HFText, grammar: Grammar, ignore_eos: bool = False) -> Constraint:
    constraint = text.constraint(grammar, ignore_eos)
    assert isinstance(constraint, Constraint), constraint
    return constraint


def allowed_ids(constraint: Constraint) -> list[int]:
    """The ids of all tokens that may come next, in order."""
    bits = _bits(constraint)
    return [token for token in range(len(bits) * 8) if _is_set(bits, token)]


def token_ids(text: HFText, answer: str) -> list[int]:
    """The tokens of an answer, without special tokens added."""
    tokens = text.tokenize(TextPrompt(answer), special_tokens=False)
    assert isinstance(tokens, tuple), tokens
    return [token.token_id for token in tokens]


def acceptance(text: HFText, grammar: Grammar, answer: str) -> bool | None:
    """Whether the grammar allows the answer to end here; None if it does not allow the answer."""
    constraint, complete = new_constraint(text, grammar), False
    for token in token_ids(text, answer):
        if complete or not _is_set(_bits(constraint), token):
            return None
        complete = constraint.accept(token)
    if complete:
        return True
    bits = _bits(constraint)
    return any(_is_set(bits, token) for token in text.end_ids)


def random_answer(text: HFText, grammar: Grammar, seed: int, max_tokens: int = 6000) -> str:
    """An answer whose every token is chosen among the allowed ones with equal probability."""
    rng, constraint = random.Random(seed), new_constraint(text, grammar)
    ids: list[int] = []
    while len(ids) < max_tokens:
        token = rng.choice(allowed_ids(constraint))
        if token not in text.end_ids:
            ids.append(token)
        if constraint.accept(token):
            answer = text.detokenize(ids, skip_special_tokens=False)
            assert isinstance(answer, str), answer
            return answer
    raise AssertionError(f"the answer did not end within {max_tokens} tokens")


def _bits(constraint: Constraint) -> bytearray:
    bits = constraint.allowed()
    assert isinstance(bits, bytearray), bits
    return bits


def _is_set(bits: bytearray, token: int) -> bool:
    return bool(bits[token // 8] >> token % 8 & 1)
