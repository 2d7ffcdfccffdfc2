from __future__ import annotations

import pickle
import re

import pytest

from serve_app import errors
from serve_app.errors import ServeAppError

KINDS = ServeAppError.__subclasses__()


@pytest.mark.parametrize("kind", [ServeAppError, *KINDS])
def test_an_error_survives_the_way_between_processes(kind: type[ServeAppError]) -> None:
    for error in (kind("what was wrong", "max_tokens", 2.5), kind("only words")):
        there = pickle.loads(pickle.dumps(error))
        assert type(there) is kind
        assert (there.message, there.param, there.retry_after_s) == (error.message, error.param, error.retry_after_s)
        assert (there.status, there.code, str(there)) == (kind.status, kind.code, error.message)


def test_the_table_in_the_docstring_is_true_and_whole() -> None:
    table = dict(re.findall(r"[├└]── (\w+) +(\d+)", errors.__doc__ or ""))
    assert table == {kind.__name__: str(kind.status) for kind in KINDS}


def test_no_two_kinds_share_a_code() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
