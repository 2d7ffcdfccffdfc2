from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from serve_app.engine.sequence import Advance, Sampled, Sequence, Step
from serve_app.engine.toy import END
from serve_app.types import FinishReason, Logprobs, SamplingParams, TokenEvent, TokenLogprob

from .toys import sequence


def speak(spoken: Sequence, tokens: bytes | list[int]) -> list[TokenEvent]:
    """Events until the tokens or the sequence end."""
    events: list[TokenEvent] = []
    for token in tokens:
        events.append(spoken.accept(Sampled(token), now=1.0))
        if events[-1].finish_reason is not None:
            break
    return events


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_a_new_sequence_has_its_whole_prompt_before_it() -> None:
    new = sequence("hello")
    assert (new.pending, new.generated, new.computed, new.slot) == (5, 0, 0, None)
    assert new.stream.prompt_tokens == 5
    assert new.deadline == 60


def test_a_sequence_without_tokens_is_a_mistake_of_ours() -> None:
    made = sequence()
    with pytest.raises(AssertionError, match="never advance"):
        Sequence(made.stream, [], made._detokenizer._decoder, frozenset(), 16)


def test_max_tokens_ends_it_by_length() -> None:
    events = speak(sequence(params=SamplingParams(max_tokens=3)), b"xyzzy")
    assert text_of(events) == "xyz"
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_the_context_ends_it_by_length(max_tokens: int | None) -> None:
    events = speak(sequence("abcde", SamplingParams(max_tokens=max_tokens), context=8), b"x" * 20)
    assert len(events) == 3
    assert events[-1].finish_reason == FinishReason.LENGTH


def test_the_end_token_ends_it_without_text() -> None:
    events = speak(sequence(), [ord("a"), END, ord("b")])
    assert [(event.text, event.finish_reason) for event in events] == [("a", None), ("", FinishReason.STOP)]


def test_ignore_eos_goes_on_past_the_end_token() -> None:
    events = speak(sequence(params=SamplingParams(max_tokens=3, ignore_eos=True)), [ord("a"), END, ord("b")])
    assert text_of(events) == "ab"
    assert events[-1].finish_reason == FinishReason.LENGTH


def test_stop_token_ids_end_it_even_with_ignore_eos() -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=(ord("!"),))
    events = speak(sequence(params=params), b"a!b")
    assert (text_of(events), events[-1].finish_reason) == ("a", FinishReason.STOP)


def test_a_stop_string_ends_it_across_tokens() -> None:
    events = speak(sequence(params=SamplingParams(stop=("END",))), b"fine ENDless")
    assert (text_of(events), len(events), events[-1].finish_reason) == ("fine ", 8, FinishReason.STOP)


def test_nothing_stops_before_min_tokens() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=4, stop=(".",))
    events = speak(sequence(params=params), [ord("."), END, ord("a"), END, ord("b")])
    assert [event.finish_reason for event in events] == [None, None, None, FinishReason.STOP]
    assert text_of(events) == ".a"


@pytest.mark.parametrize("ending", [[ord("x")], [END]])
def test_the_last_event_carries_what_was_held_back(ending: list[int]) -> None:
    events = speak(sequence(params=SamplingParams(max_tokens=3, stop=("NDX",))), [*b"EN", *ending])
    assert text_of(events) == ("ENx" if ending == [ord("x")] else "EN")
    assert events[1].text == ""


def test_a_character_cut_over_tokens_comes_with_its_last_one() -> None:
    events = speak(sequence(params=SamplingParams(max_tokens=5)), "é€".encode())
    assert [event.text for event in events] == ["", "é", "", "", "€"]


@given(st.text(min_size=1, max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
def test_the_joined_events_are_the_full_text(text: str, stop: list[str]) -> None:
    data = text.encode()
    events = speak(sequence(params=SamplingParams(max_tokens=len(data), stop=tuple(stop))), data)
    met = next((text[:n] for n in range(1, len(text) + 1) if text[:n].endswith(tuple(stop))), None)
    assert text_of(events) == (text if met is None else met[: min(met.find(s) for s in stop if s in met)])


def test_an_event_says_when_and_how_likely() -> None:
    likely = Logprobs(TokenLogprob(97, "a", -0.5), ())
    event = sequence().accept(Sampled(97, likely), now=2.5)
    assert (event.elapsed_s, event.logprobs) == (2.5, likely)


def test_a_given_seed_is_kept_and_a_missing_one_is_made() -> None:
    assert sequence(params=SamplingParams(seed=7)).seed == 7
    assert sequence().seed != sequence().seed


def test_a_step_counts_rows_and_an_advance_samples_only_at_the_end_of_its_tokens() -> None:
    one, other = sequence("abcd"), sequence("xy")
    step = Step((Advance(one, 3), Advance(other, 2)))
    assert step.rows == 5
    assert [advance.samples for advance in step.advances] == [False, True]
