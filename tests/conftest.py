"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A shell without job control has what it runs in the background ignore Ctrl-C, and every program that the tests start
# would inherit that: none of them could be stopped as a user stops it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_are_left_as_they_were() -> Iterator[None]:
    """A test that leaves one ignored would have all programs of later tests ignore it."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
