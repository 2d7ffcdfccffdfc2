"""The time from the command to the first streamed token, without and with the converted model in the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.graph.service import ROOT, SHIPPED_CONFIG
from tests.system.service import ShippedService

pytestmark = [pytest.mark.system, pytest.mark.perf, pytest.mark.timeout(300)]


LOAD = """
import sys
from serve_app.engines.native.runner import TorchRunner
from serve_app.serve_file import load_serve_file
(model,) = load_serve_file(sys.argv[1]).application.args.models
TorchRunner.from_config(model, print)
"""


@pytest.fixture(scope="session")
def converted() -> None:
    """The converted model and its packed weights are in the cache, and the operations are compiled.

    In another process, because the threads of the engine would remain in this one.
    """
    subprocess.run([sys.executable, "-c", LOAD, str(SHIPPED_CONFIG)], check=True, cwd=ROOT, timeout=240)


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
