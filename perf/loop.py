"""An event loop with timers exact to 0.1 ms, in a process that may open thousands of sockets."""

from __future__ import annotations

import asyncio
import select
import selectors
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

_Result = TypeVar("_Result")

if sys.platform == "linux":

    class _PreciseSelector(selectors.EpollSelector):
        """epoll rounds timeouts up to whole milliseconds; select, which can wait for the epoll handle, does not."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)

else:
    _PreciseSelector = selectors.DefaultSelector


def _raise_file_limit() -> None:
    """Raises the soft limit of open files, often 1024, to the hard limit."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def new_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(_PreciseSelector())


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """asyncio.run with this event loop."""
    _raise_file_limit()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)
