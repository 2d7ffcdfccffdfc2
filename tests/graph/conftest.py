from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.graph.house import Service, caller, model, sleeper


@pytest.fixture(scope="package")
def token_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model `slow` writes when it made each token, and for whom."""
    return tmp_path_factory.mktemp("slow") / "tokens"


@pytest.fixture(scope="package")
def toys(token_log: Path) -> Iterator[Service]:
    """One service for the folder, with a model for each kind of trouble."""
    models = [
        model(
            "toy",
            "builtin:toy?step_ms=2",
            engine={"max_running": 16},
            batching={"max_batch_size": 16},
            embeddings=True,
        ),
        model(
            "slow",
            f"builtin:toy?step_ms=100&log={token_log}",
            engine={"max_running": 64},
            batching={"max_batch_size": 64},
        ),
        model("narrow", "builtin:toy?step_ms=20", deployment={"max_ongoing_requests": 1, "max_queued_requests": 2}),
        model("victim", "builtin:toy?step_ms=50"),
        sleeper("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=1),
    ]
    with Service(models, heartbeat_s=0.3, max_body_bytes=65_536, warm_wait_s=30) as service:
        service.wait_for("answers on")
        yield service


@pytest.fixture
async def client(toys: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with caller(toys) as client:
        yield client
