"""A golden server in a process of its own, and a client to measure it with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from perf.client import Client
from perf.dialects import DIALECTS, Api
from perf.workload import Workload


@contextmanager
def golden(*options: str) -> Iterator[str]:
    """Yields its address."""
    command = [sys.executable, "-m", "perf.mock", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("answers on ").strip()
        finally:
            process.terminate()


def client(url: str, api: Api = "native", timeout_s: float = 30) -> Client:
    return Client(url, DIALECTS[api](None, fixed_length=True), timeout_s)


def workload(max_tokens: int = 16, words: int = 10) -> Workload:
    return Workload(words, max_tokens, seed=7)
