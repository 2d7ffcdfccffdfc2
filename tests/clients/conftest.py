"""One service for all client libraries: the embedded model with tools and embeddings."""

from __future__ import annotations

import os

import pytest

from tests.system.service import ShippedService


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.shared_services")


if RUNNING := os.environ.get("SERVE_APP_URL", ""):

    @pytest.fixture(scope="session")
    def url() -> str:
        """The address of a service that runs already."""
        return RUNNING

else:

    @pytest.fixture(scope="session")
    def url(tools_service: ShippedService) -> str:
        """The address of the service."""
        return tools_service.url
