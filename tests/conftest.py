"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell without job control has what it runs in the background ignore Ctrl-C, and every program that the tests start
# would inherit that: none of them could be stopped as a user stops it.
signal.signal(signal.SIGINT, signal.default_int_handler)
