"""A golden server in a process of its own, and a client to measure it with."""

from __future__ import annotations

from perf.calibrate import golden
from perf.client import Client
from perf.dialects import DIALECTS, Api
from perf.workload import Workload

__all__ = ["client", "golden", "workload"]


def client(url: str, api: Api = "native", timeout_s: float = 30) -> Client:
    return Client(url, DIALECTS[api](None, fixed_length=True), timeout_s)


def workload(max_tokens: int = 16, words: int = 10) -> Workload:
    return Workload(words, max_tokens, seed=7)
