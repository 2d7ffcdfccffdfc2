from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from serve_app.engines.text.detokenizer import Detokenizer
from serve_app.engines.text.overlap import overlap


class Pieces:
    """Token n is piece n of a list."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def step(self, token_id: int) -> str:
        return self._pieces[token_id]


def told(pieces: list[str], *stop: str, include_stop: bool = False) -> tuple[list[str], bool]:
    """What each token released, then the flush; and whether a stop string ended it."""
    detokenizer, released = Detokenizer(Pieces(pieces), stop, include_stop), []
    for token in range(len(pieces)):
        text, stopped = detokenizer.push(token)
        released.append(text)
        if stopped:
            return [*released, detokenizer.flush()], True
    return [*released, detokenizer.flush()], False


def test_text_passes_straight_through_without_stop_strings() -> None:
    assert told(["a", "", "bc"]) == (["a", "", "bc", ""], False)


def test_a_stop_string_is_found_across_token_borders_and_never_sent() -> None:
    assert told(["one ST", "O", "P two"], "STOP") == (["one ", "", "", ""], True)


def test_text_that_turns_out_not_to_be_a_stop_string_is_sent_late() -> None:
    assert told(["one ST", "O", "RY"], "STOP") == (["one ", "", "STORY", ""], False)


def test_the_end_releases_what_was_held_back() -> None:
    assert told(["one ST"], "STOP") == (["one ", "ST"], False)


def test_a_shorter_beginning_stays_held_when_a_longer_one_fails() -> None:
    assert told(["aa", "a", "b"], "aab") == (["", "a", "", ""], True)


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert told(["x, y. z"], ".", ",") == (["x", ""], True)


def test_before_it_may_stop_a_stop_string_is_text_like_any_other() -> None:
    detokenizer = Detokenizer(Pieces(["a.", "b.c"]), (".",))
    assert detokenizer.push(0, may_stop=False) == ("a.", None)
    assert detokenizer.push(1) == ("b", ".")


def test_a_stop_string_may_begin_before_it_counts_and_end_when_it_does() -> None:
    detokenizer = Detokenizer(Pieces(["aEN", "D"]), ("END",))
    assert detokenizer.push(0, may_stop=False) == ("a", None)
    assert detokenizer.push(1) == ("", "END")


def test_a_stop_string_can_be_left_at_the_end() -> None:
    assert told(["one ST", "O", "P two"], "STOP", include_stop=True) == (["one ", "", "STOP", ""], True)
    assert told(["x aab"], "aa", "a", "ab", include_stop=True) == (["x a", ""], True)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_what_is_sent_is_the_text_up_to_the_first_stop_string(
    pieces: list[str], stop: list[str], include_stop: bool
) -> None:
    """Whatever the cuts: the reference looks at every token's whole text."""
    released, stopped = told(pieces, *stop, include_stop=include_stop)
    whole = expected = ""
    for piece in pieces:
        whole = expected = whole + piece
        found = [(whole.find(s), len(s)) for s in stop if s in whole]
        if found:
            at, length = min(found)
            expected = whole[: at + length * include_stop]
            break
    assert stopped == any(s in whole for s in stop)
    assert "".join(released) == expected


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("", "ab", 0), ("xa", "ab", 1), ("ab", "ab", 0), ("aba", "abab", 3), ("x", "x", 0)]
)
def test_overlap_is_the_longest_proper_beginning(text: str, stop: str, length: int) -> None:
    assert overlap(text, stop) == length
