from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.events import FinishReason, Logprobs, TokenLogprob
from serve_app.core.requests import SamplingParams
from serve_app.engines.native.sequence import Advance, Sampled, Sequence, Step
from serve_app.engines.stream import Token
from serve_app.engines.toy import END

from .helpers import request, sequence, sequences


def accept_all(target: Sequence, token_ids: bytes | list[int]) -> list[Token]:
    """Accept the tokens until they, or the sequence, end."""
    tokens: list[Token] = []
    for token_id in token_ids:
        tokens.append(target.accept(Sampled(token_id), now=1.0))
        if tokens[-1].finish_reason is not None:
            break
    return tokens


def reasons(target: Sequence, token_ids: bytes | list[int]) -> list[FinishReason | None]:
    return [token.finish_reason for token in accept_all(target, token_ids)]


def test_all_tokens_of_a_new_sequence_are_pending() -> None:
    new = sequence("hello")
    assert (new.pending, new.generated, new.computed, new.slot) == (5, 0, 0, None)
    assert new.deadline == 60


def test_a_sequence_needs_a_token() -> None:
    made = sequence()
    with pytest.raises(AssertionError, match="at least one token"):
        Sequence(made.stream, [], frozenset(), 16)


def test_max_tokens_ends_an_answer_with_length() -> None:
    tokens = accept_all(sequence(params=SamplingParams(max_tokens=3)), b"xyzzy")
    assert bytes(token.token_id for token in tokens) == b"xyz"
    assert [token.finish_reason for token in tokens] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_the_context_ends_an_answer_with_length(max_tokens: int | None) -> None:
    made = sequence("abcde", SamplingParams(max_tokens=max_tokens), context=8)
    assert reasons(made, b"x" * 20) == [None, None, FinishReason.LENGTH]


def test_the_end_token_ends_an_answer_with_stop() -> None:
    assert reasons(sequence(), [ord("a"), END, ord("b")]) == [None, FinishReason.STOP]


def test_with_ignore_eos_an_answer_continues_after_the_end_token() -> None:
    made = sequence(params=SamplingParams(max_tokens=3, ignore_eos=True))
    assert reasons(made, [ord("a"), END, ord("b")]) == [None, None, FinishReason.LENGTH]


def test_stop_token_ids_end_an_answer_even_with_ignore_eos() -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=(ord("!"),))
    assert reasons(sequence(params=params), b"a!b") == [None, FinishReason.STOP]


def test_no_end_token_ends_an_answer_before_min_tokens() -> None:
    made = sequence(params=SamplingParams(max_tokens=9, min_tokens=3))
    assert reasons(made, [ord("a"), END, END, ord("b")]) == [None, None, FinishReason.STOP]


def test_a_token_carries_its_time_and_logprobs() -> None:
    likely = Logprobs(TokenLogprob(97, "a", -0.5), ())
    token = sequence().accept(Sampled(97, likely), now=2.5)
    assert (token.elapsed_s, token.logprobs) == (2.5, likely)


def test_a_missing_seed_is_drawn_at_random() -> None:
    assert sequence(params=SamplingParams(seed=7)).seed == 7
    assert sequence().seed != sequence().seed


def test_each_answer_to_one_prompt_has_its_own_seed() -> None:
    base = request(params=SamplingParams(seed=7))
    assert [s.seed for s in sequences([replace(base, index=index) for index in range(3)])] == [7, 8, 9]


def test_a_step_counts_its_rows_and_samples_only_complete_sequences() -> None:
    one, other = sequence("abcd"), sequence("xy")
    step = Step((Advance(one, 3), Advance(other, 2)))
    assert step.rows == 5
    assert [advance.samples for advance in step.advances] == [False, True]
