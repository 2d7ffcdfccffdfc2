from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator

import pytest

from serve_app import errors
from serve_app.errors import InternalError, ServeAppError, internal_error


def subclasses(of: type[ServeAppError]) -> Iterator[type[ServeAppError]]:
    for child in of.__subclasses__():
        yield child
        yield from subclasses(child)


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


ERRORS = list(subclasses(ServeAppError))


@pytest.mark.parametrize("kind", [ServeAppError, *ERRORS])
def test_an_error_survives_pickling(kind: type[ServeAppError]) -> None:
    for error in (kind("The reason.", "max_tokens", 2.5), kind("Only a message."), kind("", retry_after_s=0)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert vars(copy) == vars(error)
        assert (copy.args, copy.status, copy.code) == (error.args, kind.status, kind.code)
        assert str(copy) == copy.message == error.message


def test_the_text_of_an_error_is_its_message() -> None:
    error = ServeAppError("The reason.", "max_tokens", 2.5)
    assert (str(error), error.param, error.retry_after_s) == ("The reason.", "max_tokens", 2.5)
    assert error.args == ("The reason.", "max_tokens", 2.5)
    assert (ServeAppError("x").param, ServeAppError("x").retry_after_s) == (None, None)


def test_the_table_in_the_docstring_lists_every_error() -> None:
    table = re.findall(r"^[├└]── (\w+) +(\d+)  \S", errors.__doc__ or "", re.MULTILINE)
    assert sorted(table) == sorted((kind.__name__, str(kind.status)) for kind in ERRORS)


def test_the_code_of_an_error_is_its_name() -> None:
    assert [kind.code for kind in ERRORS if kind.code != snake_case(kind.__name__)] == []


def test_the_base_class_is_an_internal_error() -> None:
    assert (ServeAppError.status, ServeAppError.code) == (500, "internal_error")


def test_an_internal_error_hides_the_exception_which_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = internal_error(ValueError("secret"), "abc")
    assert type(error) is InternalError
    assert "Quote request abc" in error.message
    assert "secret" not in error.message
    (record,) = caplog.records
    assert record.getMessage() == "Request abc failed."
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "secret"
