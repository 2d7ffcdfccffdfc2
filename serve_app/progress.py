"""Shows the current step of a command on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Writes the current step to stderr: on a terminal as one line that changes, otherwise as one line per change."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = ""
        self._began = time.monotonic()

    def show(self, text: str) -> None:
        elapsed = f"[{time.monotonic() - self._began:5.1f} s] "
        if self._live:
            print(f"\r\x1b[2K{elapsed}{text}", end="", file=sys.stderr, flush=True)
        elif text != self._shown:
            print(elapsed + text, file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        """End the line, so that other output starts on its own."""
        if self._live and self._shown:
            print(file=sys.stderr, flush=True)
        self._shown = ""
