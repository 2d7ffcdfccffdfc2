"""The time from the command to the first streamed token, without and with the converted model in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.concurrent_load import model_config, running
from tests.system.service import ShippedService

pytestmark = [pytest.mark.system, pytest.mark.perf, pytest.mark.timeout(300)]


@pytest.fixture
def converted() -> None:
    """The converted model is in the cache, and the operations are compiled."""
    with running(model_config("builtin:smollm2-135m")):
        pass


def test_a_start_takes_at_most_25_s(converted: None, service: ShippedService) -> None:
    print(f"first streamed token after {service.first_token_s:.1f} s with the converted model")
    assert service.first_token_s <= 25


@pytest.mark.long
def test_the_first_start_takes_at_most_90_s(tmp_path: Path) -> None:
    """The packages are installed. The service converts the model and compiles the operations."""
    with ShippedService(XDG_CACHE_HOME=str(tmp_path)) as service:
        service.wait_until_ready()
        print(f"first streamed token after {service.first_token_s:.1f} s without the converted model")
        assert service.first_token_s <= 90
