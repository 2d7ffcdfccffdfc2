"""A pytest plugin: one toy service for all tests of a session that can share one, in whatever folder they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.graph.service import Service, http_client, model_config, zero_scaled_model_config

_FIXTURE = "toy_service"
_running = ExitStack()
_last_user = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    users = [item.nodeid for item in session.items if _FIXTURE in getattr(item, "fixturenames", ())]
    session.config.stash[_last_user] = users[-1] if users else ""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop the service after its last test, not at the end of the session: later tests measure times."""
    if item.nodeid == item.config.stash[_last_user]:
        _running.close()


@pytest.fixture(scope="session")
def token_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file to which the model `slow` writes the instant and the request id of each token."""
    return tmp_path_factory.mktemp("slow") / "tokens"


@pytest.fixture(scope="session")
def toy_service(token_log: Path) -> Iterator[Service]:
    """HAProxy, one ingress, and a model for each kind of test."""
    models = [
        model_config(
            "toy",
            "builtin:toy?step_ms=10",
            engine={"max_running": 16, "max_context": 4096},
            batching={"max_batch_size": 16},
            embeddings=True,
        ),
        model_config(
            "slow",
            f"builtin:toy?step_ms=100&log={token_log}",
            engine={"max_running": 64, "max_context": 4096},
            batching={"max_batch_size": 64},
        ),
        model_config(
            "narrow", "builtin:toy?step_ms=20", deployment={"max_ongoing_requests": 1, "max_queued_requests": 3}
        ),
        model_config("single", "builtin:toy?step_ms=20", engine={"max_running": 1}),
        model_config(
            "victim",
            "builtin:toy?step_ms=50",
            engine={"max_running": 16},
            batching={"max_batch_size": 16, "batch_wait_timeout_s": 0.5},
        ),
        zero_scaled_model_config("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=1),
        zero_scaled_model_config("undisturbed", "builtin:toy", downscale_to_zero_delay_s=1),
    ]
    with _running:
        service = _running.enter_context(Service(models, heartbeat_s=0.3, max_body_bytes=65_536, warm_wait_s=30))
        service.wait_until_ready()
        yield service


@pytest.fixture
async def client(toy_service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(toy_service) as client:
        yield client
