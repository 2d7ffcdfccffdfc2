from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.service import ShippedService


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.shared_services")


@pytest.fixture(scope="package")
def service() -> Iterator[ShippedService]:
    """The shipped configuration."""
    with ShippedService() as service:
        service.wait_until_ready()
        yield service
