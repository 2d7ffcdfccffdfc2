from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.collector import Collector
from tests.graph.service import PROXIES, Config, Service, http_client, model_config, zero_scaled_model_config

DEADLINE_S = 3
EXPORTS_SOON = {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=secret"}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.shared_services")


# The variant computes a token in 50 ms, the control in 10 ms.
EXPERIMENT: Config = {
    "name": "paced",
    "variants": [{"name": "control", "model": "only"}, {"name": "candidate", "model": "slow", "percent": 50}],
    "guards": {"error_rate": None, "ttft_p95": None, "tpot": 2},
}


@dataclass
class TracedService:
    """A service behind Ray's own proxy, the collector of its spans, and the log of tokens of its model `slow`."""

    service: Service
    collector: Collector
    token_log: Path


def traced_model_config() -> Config:
    """8 sequences run, one request waits in the engine and 15 at the ingress."""
    return model_config(
        "only",
        "builtin:toy?step_ms=10",
        deployment={"max_ongoing_requests": 16, "max_queued_requests": 8},
        batching={"max_batch_size": 16, "batch_wait_timeout_s": 0.01},
        embeddings=True,
        engine={"max_running": 8},
    )


@pytest.fixture(scope="package")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedService]:
    """Everything that `telemetry` can switch on, and a short deadline."""
    log = tmp_path_factory.mktemp("traced") / "tokens"
    narrow = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    models = [
        traced_model_config(),
        model_config("slow", f"builtin:toy?step_ms=50&log={log}"),
        model_config("narrow", "builtin:toy?step_ms=20", deployment=narrow),
        model_config("faulty", "builtin:toy?fails_on=bad&step_ms=20", deployment={"max_ongoing_requests": 1}),
        zero_scaled_model_config("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=1),
    ]
    with Collector() as collector:
        tracing = {"endpoint": collector.endpoint, "sampling_ratio": 1}
        with Service(
            models,
            environment={**EXPORTS_SOON, **PROXIES["python"]},
            experiments=[EXPERIMENT],
            telemetry={"tracing": tracing, "log_format": "json", "opentelemetry_metrics": True},
            request_timeout_s=DEADLINE_S,
            heartbeat_s=0.3,
            max_body_bytes=65_536,
        ) as service:
            service.wait_until_ready()
            yield TracedService(service, collector, log)


@dataclass
class Front:
    """A service behind one of the proxies.

    `model` answers quickly, `slow` writes `token_log`, `narrow` runs one request and queues few, `single` runs one and
    queues many.
    """

    proxy: str
    service: Service
    model: str
    single: str
    token_log: Path


@pytest.fixture(params=["haproxy", "python"])
def front(request: pytest.FixtureRequest) -> Front:
    if request.param == "haproxy":
        service, log = request.getfixturevalue("toy_service"), request.getfixturevalue("token_log")
        return Front("haproxy", service, "toy", "single", log)
    traced = request.getfixturevalue("traced")
    return Front("python", traced.service, "only", "faulty", traced.token_log)


@pytest.fixture
async def front_client(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(front.service) as client:
        yield client
