from __future__ import annotations

from serve_app.engines.native.drafts import Drafter


def test_what_followed_before_is_proposed() -> None:
    assert Drafter().propose([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == (4, 5, 9)


def test_the_latest_place_and_the_longest_match_count() -> None:
    assert Drafter().propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == (8,)
    assert Drafter().propose([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1) == (7,)


def test_a_text_that_says_nothing_twice_has_no_proposal() -> None:
    assert Drafter().propose(list(range(50)), 4) == ()
    assert Drafter().propose([1], 4) == ()
    assert Drafter().propose([1, 2, 1, 2], 0) == ()


def test_it_goes_on_from_where_it_was() -> None:
    drafter, tokens = Drafter(), [1, 2, 3]
    assert drafter.propose(tokens, 2) == ()
    tokens += [4, 1, 2]
    assert drafter.propose(tokens, 2) == (3, 4)


def test_who_is_never_right_rests_and_tries_again() -> None:
    drafter, tokens = Drafter(), [1, 2, 1, 2]
    tries = 0
    while drafter.propose(tokens, 2):
        drafter.learn(2, 0, len(tokens))
        tokens += [1, 2]
        tries += 1
    assert 3 <= tries <= 20
    rested = len(tokens)
    while not drafter.propose(tokens, 2):
        tokens += [1, 2]
    assert 20 <= len(tokens) - rested <= 60


def test_who_is_often_right_goes_on() -> None:
    drafter, tokens = Drafter(), [1, 2, 1, 2]
    for _ in range(100):
        assert drafter.propose(tokens, 4)
        drafter.learn(4, 1, len(tokens))
        tokens += [1, 2]
