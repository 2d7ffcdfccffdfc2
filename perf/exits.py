"""Exit codes of the commands in this package."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    OK = 0
    FAILED = 1  # an objective was missed, requests failed, or a metric regressed against the baseline
    USAGE = 2  # argparse uses the same code
    UNREACHABLE = 3
    CLIENT_LIMITED = 4  # the load generator was the bottleneck, so the metrics do not describe the server
    INTERRUPTED = 130  # shells use this code for Ctrl-C
