"""Settings and checks for all tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

pytest_plugins = ["tests.order"]

# A shell without job control starts its background programs with SIGINT ignored, and every program that the tests start
# would inherit that: Ctrl-C could not stop them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Collect no garbage while modules are imported: modules stay, and the search for garbage takes longer."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_test_leaves_a_signal_ignored() -> Iterator[None]:
    """All programs that later tests start would ignore it too."""
    before = ignored()
    yield
    assert ignored() <= before


def ignored() -> set[signal.Signals]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {number for number in numbers if signal.getsignal(number) is signal.SIG_IGN}
