from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.service import ShippedService

FOLDER = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.shared_services")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shipped configuration are a group (tests/order.py)."""
    for item in items:
        if item.path.is_relative_to(FOLDER) and "service" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("shipped_service"))


@pytest.fixture(scope="package")
def service() -> Iterator[ShippedService]:
    """The shipped configuration."""
    with ShippedService() as service:
        service.wait_until_ready()
        yield service
