from __future__ import annotations

from serve_app.engines.native.drafts import Drafter


def test_the_tokens_after_an_earlier_occurrence_are_proposed() -> None:
    assert Drafter().propose([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == (4, 5, 9)


def test_the_latest_occurrence_and_the_longest_match_win() -> None:
    assert Drafter().propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == (8,)
    assert Drafter().propose([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1) == (7,)


def test_a_text_without_repetition_has_no_proposal() -> None:
    assert Drafter().propose(list(range(50)), 4) == ()
    assert Drafter().propose([1], 4) == ()
    assert Drafter().propose([1, 2, 1, 2], 0) == ()


def test_a_later_proposal_uses_the_tokens_added_since() -> None:
    drafter, tokens = Drafter(), [1, 2, 3]
    assert drafter.propose(tokens, 2) == ()
    tokens += [4, 1, 2]
    assert drafter.propose(tokens, 2) == (3, 4)


def test_a_drafter_that_is_never_right_pauses_and_tries_again() -> None:
    drafter, tokens = Drafter(), [1, 2, 1, 2]
    tries = 0
    while drafter.propose(tokens, 2):
        drafter.record(2, 0, len(tokens))
        tokens += [1, 2]
        tries += 1
    assert 3 <= tries <= 20
    pause_start = len(tokens)
    while not drafter.propose(tokens, 2):
        tokens += [1, 2]
    assert 20 <= len(tokens) - pause_start <= 60


def test_a_drafter_that_is_often_right_does_not_pause() -> None:
    drafter, tokens = Drafter(), [1, 2, 1, 2]
    for _ in range(100):
        assert drafter.propose(tokens, 4)
        drafter.record(4, 1, len(tokens))
        tokens += [1, 2]
