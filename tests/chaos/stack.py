"""The service under chaos and soak, with all that it depends on: tracing backend, Redis, Prometheus, a moved clock."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.chaos import faults
from tests.collector import Collector
from tests.graph.service import Config, Service, free_port, model_config
from tests.redis_server import RedisServer

TOY: Config = {"num_replicas": 2, "max_ongoing_requests": 256, "max_queued_requests": 256}


@dataclass
class Stack:
    """`folder` has the clock of the service, which is `clock_s` ahead, and room for other files of the faults."""

    service: Service
    collector: Collector
    redis: RedisServer
    prometheus: psutil.Process
    folder: Path
    clock_s: int = 0

    def move_clock(self, seconds: int) -> None:
        """Let the wall clock of the service jump by these seconds."""
        self.clock_s += seconds
        faults.jump(self.folder, self.clock_s)


@contextmanager
def stack(folder: Path, ingresses: int, traced: float = 0.1) -> Iterator[Stack]:
    """Two replicas of the model `toy` behind HAProxy.

    The share `traced` of the requests is traced, greedy answers are kept in Redis, and Prometheus reads the metrics.
    """
    models = [
        model_config("toy", "builtin:toy?step_ms=10", TOY, engine={"max_running": 128}, batching={"max_batch_size": 16})
    ]
    with ExitStack() as closing:
        collector = closing.enter_context(Collector(keep=False))
        redis = RedisServer(folder)
        closing.callback(redis.kill)
        service = closing.enter_context(
            Service(
                models,
                environment=faults.clock(folder),
                ingress={"num_replicas": ingresses},
                telemetry={"tracing": {"endpoint": collector.endpoint, "sampling_ratio": traced}},
                response_cache={"url": redis.url, "timeout_s": 0.2},
                heartbeat_s=1,
                stalled_client_s=5,
            )
        )
        service.wait_for_output("answers on", seconds=300)  # also beside other programs that use all cores
        yield Stack(service, collector, redis, closing.enter_context(prometheus(folder, service)), folder)


@contextmanager
def prometheus(folder: Path, service: Service) -> Iterator[psutil.Process]:
    """A Prometheus that reads the metrics of the service every second."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.fail("prometheus is not installed; run apt-get install -y prometheus")
    file = folder / "prometheus.yml"
    targets = [{"targets": [f"127.0.0.1:{service.port}"]}]
    jobs = [{"job_name": "serve_app", "scrape_interval": "1s", "static_configs": targets}]
    file.write_text(yaml.safe_dump({"scrape_configs": jobs}))
    options = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'metrics'}"]
    listen = f"--web.listen-address=127.0.0.1:{free_port()}"
    nowhere = subprocess.DEVNULL
    with subprocess.Popen([binary, *options, listen], stdout=nowhere, stderr=nowhere) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()
