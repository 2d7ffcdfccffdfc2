"""How long a start takes, with nothing else running: this file comes before those whose services stay."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import STORY, Shipped

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def first_token_s(**environment: Any) -> float:
    """Seconds from the command to the first streamed token."""
    began = time.monotonic()
    with Shipped(**environment) as service:
        while time.monotonic() < began + 120:
            try:
                with httpx.stream("POST", service.url + "/generate_stream", json=STORY, timeout=60) as response:
                    if response.status_code == 200 and next(response.iter_lines()).startswith("data: "):
                        return time.monotonic() - began
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    raise AssertionError(service.said())


def test_the_first_start_takes_under_90_seconds_and_the_next_under_25(tmp_path: Path) -> None:
    """Packages are there; the model's conversion is not, the first time."""
    first = first_token_s(XDG_CACHE_HOME=str(tmp_path))
    later = first_token_s(XDG_CACHE_HOME=str(tmp_path))
    print(f"first streamed token after {first:.1f} s the first time, {later:.1f} s later")
    assert first <= 90
    assert later <= 25
