"""An event loop whose timers are good to a tenth of a millisecond, in a process that may open thousands of sockets."""

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

    class _FineSelector(selectors.EpollSelector):
        """epoll rounds what it waits up to whole milliseconds; select, which it can be waited for with, does not."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)

else:
    _FineSelector = selectors.DefaultSelector


def _allow_many_files() -> None:
    """Up to what the system lets this process have; many systems begin with 1024."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def new_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(_FineSelector())


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """As asyncio.run."""
    _allow_many_files()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)
