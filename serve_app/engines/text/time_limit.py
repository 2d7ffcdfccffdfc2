"""Ends Python code that runs too long, by an exception in its thread."""

from __future__ import annotations

import ctypes
import threading
from types import TracebackType

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc


class TookTooLong(Exception):
    """The code ran for longer than its limit."""


class TimeLimit:
    """Raises TookTooLong within its body after `seconds`.

    Python checks for such an exception between two bytecodes. Therefore the body must be Python code: a single call of
    a C function is not interrupted.
    """

    def __init__(self, seconds: float) -> None:
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._timer = threading.Timer(seconds, self._interrupt)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
        _raise_in_thread(self._thread, None)  # an exception that has not been raised yet
        self._timer.cancel()

    def _interrupt(self) -> None:
        with self._lock:
            if not self._ended:
                _raise_in_thread(self._thread, ctypes.py_object(TookTooLong))
