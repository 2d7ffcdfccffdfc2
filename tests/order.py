"""A pytest plugin: the order of the tests, and the core of each worker of pytest-xdist."""

from __future__ import annotations

import os

import pytest

STORIES, PERF = "stories", "perf"
# The groups and files that take the longest are first, so that no worker has one to itself at the end.
FIRST = (
    "toy_service",
    "tests/graph/test_startup.py",
    "tools_service",
    "tests/contract/test_contract.py",
    "traced",
    "shipped_service",
    "tests/models/test_lora.py",
    "tests/infra/test_plan.py",
    "tests/models/test_smollm2.py",
    "tests/models/test_kernels.py",
    "tests/models/test_quality.py",
    "tests/models/test_loader.py",
    "tests/engines/test_contract.py",
    "tests/models/test_grammar.py",
    "tests/cluster/test_ray.py",
    "tests/infra/test_policy.py",
    "tests/infra/test_addons.py",
)
# Tests that measure times are the last of their group, but the first of this one, because they measure the start.
MEASURED_FIRST = "shipped_service"
# The stories of tests/alerts run in the background until the last tests wait for them.
ORDER = (*FIRST, None, PERF, STORIES)


def pytest_configure() -> None:
    """One core for each worker: the threads of two engines that share two cores wait for each other at each barrier."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)


def place(item: pytest.Item) -> tuple[int, bool]:
    """Tests of one group are together. The group of a test without a mark is its file, or PERF."""
    mark, perf = item.get_closest_marker("xdist_group"), item.get_closest_marker("perf") is not None
    name = str(mark.args[0]) if mark is not None else PERF if perf else item.nodeid.partition("::")[0]
    return ORDER.index(name if name in ORDER else None), perf != (name == MEASURED_FIRST)
