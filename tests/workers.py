"""A pytest plugin: which tests run at the same time when several workers of pytest-xdist share them.

With `--dist loadgroup`, tests that share a service form a group, which runs on one worker. While tests marked `perf`
run, the other workers wait. Only the stories of tests/alerts, which wait for minutes, run beside all tests.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from filelock import ReadWriteLock

STORIES, PERF = "stories", "perf"
# The groups and files that take the longest are first, so that no worker has one to itself at the end.
FIRST = (
    STORIES,
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
MEASURED_FIRST = "shipped_service"
_lock = pytest.StashKey[ReadWriteLock]()
_alone = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if grouped(config):
        config.stash[_lock] = ReadWriteLock(config.cache.mkdir("workers") / "lock.db")
    elif worker and hasattr(os, "sched_setaffinity"):
        # One core for each worker: the threads of two engines that share two cores wait for each other at each barrier.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def grouped(config: pytest.Config) -> bool:
    """Whether this is a worker of pytest-xdist that gets whole groups."""
    return bool(getattr(config.option, "loadgroup", False))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the names of the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(PERF if is_perf(item) else item.nodeid.partition("::")[0]))
    order = [*FIRST, None, PERF]
    if not grouped(config):  # in one process, the stories run in the background until their tests wait for them
        order = [*FIRST[1:], None, PERF, STORIES]

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = group(item)
        # Together, so that the others wait once: after the rest of the group, but before it if they measure the start.
        return order.index(name if name in order else None), is_perf(item) != (name == MEASURED_FIRST)

    items.sort(key=place)


def group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return str(mark.args[0])


def is_perf(item: pytest.Item) -> bool:
    return item.get_closest_marker("perf") is not None


@pytest.hookimpl(tryfirst=True, wrapper=True)  # the time limit of a test begins when it does not wait any more
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Hold the lock while a test and its fixtures run, and between two tests that are both `perf`."""
    lock = item.config.stash.get(_lock, None)
    if lock is None or group(item) == STORIES:
        return (yield)
    if not is_perf(item):
        with lock.read_lock():
            return (yield)
    if not item.config.stash.get(_alone, False):
        lock.acquire_write()
    try:
        return (yield)
    finally:
        item.config.stash[_alone] = nextitem is not None and is_perf(nextitem)
        if not item.config.stash[_alone]:
            lock.release()
