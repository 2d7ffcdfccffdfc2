"""A pytest plugin: services that all tests of a session share, in whatever folder they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.graph.service import Service, http_client, model_config, zero_scaled_model_config
from tests.system.service import ToolsService

SHARED = ("toy_service", "tools_service")
GROUPS = ("traced", "toy_service", "tools_service")
# The service behind each of tests/graph's fronts.
FRONTS = {"haproxy": "toy_service", "python": "traced"}
_running = {fixture: ExitStack() for fixture in SHARED}
_last_users = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one service are a group (order.py)."""
    for item in items:
        found = [service for service in GROUPS if service in used(item)]
        if found:  # every worker must choose the same one
            item.add_marker(pytest.mark.xdist_group(found[0]))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    users = [(fixture, item.nodeid) for item in session.items for fixture in shared_by(item)]
    session.config.stash[_last_users] = dict(users)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop a service after its last test, not at the end of the session: later tests measure times."""
    for fixture, last_user in item.config.stash[_last_users].items():
        if item.nodeid == last_user:
            _running[fixture].close()


def shared_by(item: pytest.Item) -> list[str]:
    """The shared services that this test uses."""
    return [fixture for fixture in SHARED if fixture in used(item)]


def used(item: pytest.Item) -> set[str]:
    """The fixtures of a test, and the service behind its front."""
    names = set(getattr(item, "fixturenames", ()))
    if "front" in names and isinstance(item, pytest.Function):
        names.add(FRONTS[str(item.callspec.params["front"])])
    return names


@pytest.fixture(scope="session")
def token_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file to which the model `slow` writes the instant and the request id of each token."""
    return tmp_path_factory.mktemp("slow") / "tokens"


@pytest.fixture(scope="session")
def hang_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replica of the model `victim` hangs when this file exists, and removes it."""
    return tmp_path_factory.mktemp("victim") / "hang"


@pytest.fixture(scope="session")
def toy_service(token_log: Path, hang_file: Path) -> Iterator[Service]:
    """HAProxy, one ingress with a response cache, and a model for each kind of test.

    Most requests of tests are sampled without a seed, so that their answers are not from the cache.
    """
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
            "busy",
            "builtin:toy?step_ms=20",
            deployment={"max_ongoing_requests": 16, "max_queued_requests": 8},
            engine={"max_running": 8},
        ),
        model_config(
            "victim",
            f"builtin:toy?step_ms=50&fails_on=bad&nan_on=nan&hangs_if={hang_file}",
            engine={"max_running": 16, "step_timeout_s": 3},
            batching={"max_batch_size": 16, "batch_wait_timeout_s": 0.5},
        ),
        zero_scaled_model_config("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=1),
        zero_scaled_model_config("undisturbed", "builtin:toy", downscale_to_zero_delay_s=1),
    ]
    with _running["toy_service"] as running:
        service = running.enter_context(
            Service(
                models,
                response_cache={},
                sections={"batches": {}, "idempotency": {"shared": True}},
                heartbeat_s=0.3,
                max_body_bytes=65_536,
                warm_wait_s=30,
            )
        )
        service.wait_until_ready()
        yield service


@pytest.fixture(scope="session")
def tools_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolsService]:
    """The embedded model, with tools, embeddings and adapters."""
    with _running["tools_service"] as running:
        service = running.enter_context(ToolsService(tmp_path_factory.mktemp("tools")))
        service.wait_until_ready()
        yield service


@pytest.fixture
async def client(toy_service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(toy_service) as client:
        yield client
