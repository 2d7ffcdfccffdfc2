from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.events import FinishReason, Logprobs, TokenLogprob
from serve_app.core.requests import SamplingParams
from serve_app.engines.native.sequence import Advance, Sampled, Sequence, Step
from serve_app.engines.native.stream import Token
from serve_app.engines.toy import END

from .helpers import request, sequence, sequences


def speak(spoken: Sequence, tokens: bytes | list[int]) -> list[Token]:
    """Until the tokens or the sequence end."""
    said: list[Token] = []
    for token in tokens:
        said.append(spoken.accept(Sampled(token), now=1.0))
        if said[-1].finish_reason is not None:
            break
    return said


def reasons(spoken: Sequence, tokens: bytes | list[int]) -> list[FinishReason | None]:
    return [token.finish_reason for token in speak(spoken, tokens)]


def test_a_new_sequence_has_its_whole_prompt_before_it() -> None:
    new = sequence("hello")
    assert (new.pending, new.generated, new.computed, new.slot) == (5, 0, 0, None)
    assert new.deadline == 60


def test_a_sequence_without_tokens_is_a_mistake_of_ours() -> None:
    made = sequence()
    with pytest.raises(AssertionError, match="never advance"):
        Sequence(made.stream, [], frozenset(), 16)


def test_max_tokens_ends_it_by_length() -> None:
    said = speak(sequence(params=SamplingParams(max_tokens=3)), b"xyzzy")
    assert bytes(token.token_id for token in said) == b"xyz"
    assert [token.finish_reason for token in said] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_the_context_ends_it_by_length(max_tokens: int | None) -> None:
    made = sequence("abcde", SamplingParams(max_tokens=max_tokens), context=8)
    assert reasons(made, b"x" * 20) == [None, None, FinishReason.LENGTH]


def test_the_end_token_ends_it() -> None:
    assert reasons(sequence(), [ord("a"), END, ord("b")]) == [None, FinishReason.STOP]


def test_ignore_eos_goes_on_past_the_end_token() -> None:
    made = sequence(params=SamplingParams(max_tokens=3, ignore_eos=True))
    assert reasons(made, [ord("a"), END, ord("b")]) == [None, None, FinishReason.LENGTH]


def test_stop_token_ids_end_it_even_with_ignore_eos() -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=(ord("!"),))
    assert reasons(sequence(params=params), b"a!b") == [None, FinishReason.STOP]


def test_no_token_ends_it_before_min_tokens() -> None:
    made = sequence(params=SamplingParams(max_tokens=9, min_tokens=3))
    assert reasons(made, [ord("a"), END, END, ord("b")]) == [None, None, FinishReason.STOP]


def test_a_token_says_when_and_how_likely() -> None:
    likely = Logprobs(TokenLogprob(97, "a", -0.5), ())
    token = sequence().accept(Sampled(97, likely), now=2.5)
    assert (token.elapsed_s, token.logprobs) == (2.5, likely)


def test_a_given_seed_is_kept_and_a_missing_one_is_made() -> None:
    assert sequence(params=SamplingParams(seed=7)).seed == 7
    assert sequence().seed != sequence().seed


def test_every_answer_to_one_prompt_has_a_seed_of_its_own() -> None:
    asked = request(params=SamplingParams(seed=7))
    assert [s.seed for s in sequences([replace(asked, index=index) for index in range(3)])] == [7, 8, 9]


def test_a_step_counts_rows_and_an_advance_samples_only_at_the_end_of_its_tokens() -> None:
    one, other = sequence("abcd"), sequence("xy")
    step = Step((Advance(one, 3), Advance(other, 2)))
    assert step.rows == 5
    assert [advance.samples for advance in step.advances] == [False, True]
