"""What holds for all tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

# A shell without job control has what it runs in the background ignore Ctrl-C, and every program that the tests start
# would inherit that: none of them could be stopped as a user stops it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Until everything is imported: the modules stay, and looking for garbage among them takes longer than that."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_signal_is_left_ignored() -> Iterator[None]:
    """All programs of later tests would ignore it."""
    before = ignored()
    yield
    assert ignored() <= before


def ignored() -> set[signal.Signals]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {number for number in numbers if signal.getsignal(number) is signal.SIG_IGN}
