"""The time from the command to the first streamed token, without and with the converted model in the cache."""

from __future__ import annotations

import pytest

from tests.system.conftest import ShippedService

pytestmark = [pytest.mark.system, pytest.mark.alone, pytest.mark.timeout(300)]


def test_the_first_start_takes_at_most_90_s_and_the_next_25_s(
    tools_service: ShippedService, service: ShippedService
) -> None:
    """The packages are installed. The first start converts the model; an idle service runs during the second."""
    first, second = tools_service.first_token_s, service.first_token_s
    print(f"first streamed token after {first:.1f} s without and {second:.1f} s with the converted model")
    assert first <= 90
    assert second <= 25
