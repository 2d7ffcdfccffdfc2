"""Starts the slow stories of this folder in the background, before its first test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import order
from tests.alerts.changes import report_changes
from tests.alerts.live import Background, ModelOutage, ServiceOutage, Story, model_outage, service_outage
from tests.alerts.watched import Watched, watch_dashboards

# Story by the fixture that returns its result.
STORIES: dict[str, Story] = {
    "model_outage": model_outage,
    "service_outage": service_outage,
    "watched": watch_dashboards,
    "reported": report_changes,
}


def _needed(item: pytest.Item) -> set[str]:
    return STORIES.keys() & set(getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a story are a group (tests/order.py)."""
    for item in items:
        if _needed(item):
            item.add_marker(pytest.mark.xdist_group(order.STORIES))


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    background = Background(tmp_path_factory.mktemp("live"))
    yield background
    background.close()


@pytest.fixture(scope="session", autouse=True)
def start_stories(request: pytest.FixtureRequest) -> None:
    """Start at the first test of this folder. A worker of pytest-xdist may not be the one that gets the tests of the
    stories, so it starts the stories when a test needs them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _start(request)


def _start(request: pytest.FixtureRequest) -> Background:
    background: Background = request.getfixturevalue("background")
    needed = set[str]().union(*map(_needed, request.session.items))
    background.start({name: story for name, story in STORIES.items() if name in needed})
    return background


@pytest.fixture(scope="session", name="model_outage")
def model_outage_result(request: pytest.FixtureRequest) -> ModelOutage:
    result: ModelOutage = _start(request).result("model_outage")
    return result


@pytest.fixture(scope="session", name="service_outage")
def service_outage_result(request: pytest.FixtureRequest) -> ServiceOutage:
    result: ServiceOutage = _start(request).result("service_outage")
    return result


@pytest.fixture(scope="session")
def watched(request: pytest.FixtureRequest) -> Watched:
    result: Watched = _start(request).result("watched")
    return result


@pytest.fixture(scope="session")
def reported(request: pytest.FixtureRequest) -> str:
    result: str = _start(request).result("reported")
    return result
