"""One service for all client libraries: the embedded model with tools and embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.system.conftest import ToolsService


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service. The environment variable SERVE_APP_URL can name a service that runs already."""
    if given := os.environ.get("SERVE_APP_URL"):
        yield given
        return
    with ToolsService(tmp_path_factory.mktemp("clients")) as service:
        service.wait_until_ready()
        yield service.url
