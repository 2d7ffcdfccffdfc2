"""What a command of this suite ends with."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    OK = 0
    FAILED = 1  # an objective was missed, requests failed, or something got worse than the baseline
    USAGE = 2  # argparse's own
    UNREACHABLE = 3
    CLIENT_LIMITED = 4  # the figures are this client's and not the server's
    INTERRUPTED = 130  # as shells have it for Ctrl-C
