"""Tests of stop strings in text that arrives token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from serve_app.engines.text.detokenizer import Detokenizer
from serve_app.engines.text.overlap import overlap


class ListDecoder:
    """Decodes token n to item n of a list."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def step(self, token_id: int) -> str:
        return self._texts[token_id]


def detokenize(texts: list[str], *stop: str, include_stop: bool = False) -> tuple[list[str], bool]:
    """The text that each token and the final flush emit; and whether a stop string ended the text."""
    detokenizer, emitted = Detokenizer(ListDecoder(texts), stop, include_stop), []
    for token in range(len(texts)):
        text, stopped_by = detokenizer.push(token)
        emitted.append(text)
        if stopped_by:
            return [*emitted, detokenizer.flush()], True
    return [*emitted, detokenizer.flush()], False


def test_text_without_stop_strings_is_emitted_at_once() -> None:
    assert detokenize(["a", "", "bc"]) == (["a", "", "bc", ""], False)


def test_stop_string_across_tokens_is_found_and_not_emitted() -> None:
    assert detokenize(["one ST", "O", "P two"], "STOP") == (["one ", "", "", ""], True)


def test_text_that_only_begins_like_a_stop_string_is_emitted_later() -> None:
    assert detokenize(["one ST", "O", "RY"], "STOP") == (["one ", "", "STORY", ""], False)


def test_flush_emits_the_text_held_back() -> None:
    assert detokenize(["one ST"], "STOP") == (["one ", "ST"], False)


def test_shorter_prefix_stays_held_back_when_a_longer_one_fails() -> None:
    assert detokenize(["aa", "a", "b"], "aab") == (["", "a", "", ""], True)


def test_earliest_stop_string_ends_the_text() -> None:
    assert detokenize(["x, y. z"], ".", ",") == (["x", ""], True)


def test_stop_string_is_ordinary_text_while_the_text_may_not_stop() -> None:
    detokenizer = Detokenizer(ListDecoder(["a.", "b.c"]), (".",))
    assert detokenizer.push(0, may_stop=False) == ("a.", None)
    assert detokenizer.push(1) == ("b", ".")


def test_stop_string_may_begin_before_the_text_may_stop() -> None:
    detokenizer = Detokenizer(ListDecoder(["aEN", "D"]), ("END",))
    assert detokenizer.push(0, may_stop=False) == ("a", None)
    assert detokenizer.push(1) == ("", "END")


def test_include_stop_keeps_the_stop_string_at_the_end() -> None:
    assert detokenize(["one ST", "O", "P two"], "STOP", include_stop=True) == (["one ", "", "STOP", ""], True)
    assert detokenize(["x aab"], "aa", "a", "ab", include_stop=True) == (["x a", ""], True)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_emitted_text_is_the_text_up_to_the_first_stop_string(
    texts: list[str], stop: list[str], include_stop: bool
) -> None:
    """The reference searches the whole text after each token."""
    emitted, stopped = detokenize(texts, *stop, include_stop=include_stop)
    whole = expected = ""
    for text in texts:
        whole = expected = whole + text
        found = [(whole.find(s), len(s)) for s in stop if s in whole]
        if found:
            start, length = min(found)
            expected = whole[: start + length * include_stop]
            break
    assert stopped == any(s in whole for s in stop)
    assert "".join(emitted) == expected


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("", "ab", 0), ("xa", "ab", 1), ("ab", "ab", 0), ("aba", "abab", 3), ("x", "x", 0)]
)
def test_overlap_is_the_longest_proper_prefix_that_ends_the_text(text: str, stop: str, length: int) -> None:
    assert overlap(text, stop) == length
