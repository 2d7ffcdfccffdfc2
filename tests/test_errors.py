from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from serve_app import errors
from serve_app.errors import ServeAppError


def kinds_of(kind: type[ServeAppError]) -> Iterator[type[ServeAppError]]:
    for child in kind.__subclasses__():
        yield child
        yield from kinds_of(child)


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


KINDS = list(kinds_of(ServeAppError))


@pytest.mark.parametrize("kind", [ServeAppError, *KINDS])
def test_an_error_survives_the_way_between_processes(kind: type[ServeAppError]) -> None:
    for error in (kind("what was wrong", "max_tokens", 2.5), kind("only words"), kind("", retry_after_s=0)):
        there = pickle.loads(pickle.dumps(error))
        assert type(there) is kind
        assert vars(there) == vars(error)
        assert (there.args, there.status, there.code) == (error.args, kind.status, kind.code)
        assert str(there) == there.message == error.message


def test_an_error_says_its_message_and_no_more() -> None:
    error = ServeAppError("what was wrong", "max_tokens", 2.5)
    assert (str(error), error.param, error.retry_after_s) == ("what was wrong", "max_tokens", 2.5)
    assert error.args == ("what was wrong", "max_tokens", 2.5)
    assert (ServeAppError("x").param, ServeAppError("x").retry_after_s) == (None, None)


def test_the_table_in_the_docstring_is_true_and_whole() -> None:
    table = re.findall(r"^[├└]── (\w+) +(\d+)  \S", errors.__doc__ or "", re.MULTILINE)
    assert sorted(table) == sorted((kind.__name__, str(kind.status)) for kind in KINDS)


def test_a_kinds_code_is_its_name() -> None:
    assert [kind.code for kind in KINDS if kind.code != snake_case(kind.__name__)] == []


def test_what_is_of_no_kind_is_ours() -> None:
    assert (ServeAppError.status, ServeAppError.code) == (500, "internal_error")
