"""Starts the service as a user does, `python -m serve_app`, with toy models, and reads its answers and metrics."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
SHIPPED_CONFIG = ROOT / "serve_config.yaml"
# The environment that selects each of Ray Serve's HTTP proxies.
PROXIES = {"haproxy": {}, "python": {"RAY_SERVE_ENABLE_HA_PROXY": "0"}}
Config = dict[str, Any]
T = TypeVar("T")

DEPLOYMENT: Config = {
    "num_replicas": 1,
    "max_ongoing_requests": 64,
    "max_queued_requests": 64,
    "health_check_period_s": 1,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 1,
}


def model_config(name: str, source: str = "builtin:toy", deployment: Config | None = None, **sections: Any) -> Config:
    """A model of the configuration file that reserves 1 % of a core, so that many models fit on a small machine."""
    resources = {"num_cpus": 0.01, **sections.pop("resources", {})}
    # The toy model repeats its prompt, so that every draft token would be accepted and streams would have no duration.
    engine = {"draft_tokens": 0, **sections.pop("engine", {})}
    return {
        "name": name,
        "source": source,
        "resources": resources,
        "engine": engine,
        "batching": {"max_batch_size": 1},
        "deployment": {**DEPLOYMENT, **(deployment or {})},
        **sections,
    }


def zero_scaled_model_config(name: str, source: str, downscale_to_zero_delay_s: float) -> Config:
    """A model with `min_replicas: 0`, which starts without a replica."""
    autoscaling = {
        "min_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": downscale_to_zero_delay_s,
        "look_back_period_s": 11,
    }
    return model_config(name, source, deployment={"num_replicas": None, "autoscaling": autoscaling})


def serve_config(
    models: Sequence[Config],
    port: int = 8000,
    ingress: Config | None = None,
    ingress_cpus: float = 0,
    host: str = "127.0.0.1",
    telemetry: Config | None = None,
    response_cache: Config | None = None,
    experiments: Sequence[Config] | None = None,
    auth: Config | None = None,
    database: Config | None = None,
    sections: Config | None = None,
    **limits: Any,
) -> Config:
    """A Ray Serve config file. `ingress` changes the deployment options of the ingress; `sections` are further args.

    Without `auth` everyone may use the service, on any address.
    """
    deployment = {**DEPLOYMENT, "max_ongoing_requests": 1024, **(ingress or {})}
    args = {
        "ingress": {"num_cpus": ingress_cpus, "deployment": deployment},
        "limits": limits,
        "telemetry": telemetry or {},
        "response_cache": response_cache,
        "auth": {"allow_anonymous": True} if auth is None and host != "127.0.0.1" else auth,
        "database": database or {},
        **(sections or {}),
    }
    application: Config = {
        "name": "serve_app",
        "route_prefix": "/",
        "import_path": "serve_app.app:build",
        "args": {**args, "models": list(models)},
    }
    if experiments is not None:
        user_config = {"experiments": list(experiments)}
        application["deployments"] = [{"name": "Ingress", "user_config": user_config}]
    return {"http_options": {"host": host, "port": port}, "applications": [application]}


def http_client(service: Service) -> httpx.AsyncClient:
    """A client without a limit of connections, which opens a new connection for each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits)


def free_port() -> int:
    """A free port between the range of Ray's workers and the range from which the system assigns ports."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Program:
    """A Python module that runs with its own Ray folder and token. On exit all processes that it started are ended.

    `{folder}` in the command is the program's folder.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        # A short path: Ray creates sockets in this folder, and a socket's path has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="sa"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder),
            "XDG_STATE_HOME": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            **environment,
        }
        self._output = self.folder / "output"
        self._seen: dict[int, psutil.Process] = {}
        self.started = time.monotonic()
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *(part.replace("{folder}", str(self.folder)) for part in command)],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.interrupt()
        finally:  # also when the program did not end after the signal
            for process in self.running():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(timeout=10)
            shutil.rmtree(self.folder, ignore_errors=True)

    def output(self) -> str:
        """Standard output and standard error so far."""
        return self._output.read_text(errors="replace")

    def wait_for_output(self, text: str, seconds: float = 90) -> str:
        """Returns the output once it contains `text`."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output()}"
            assert time.monotonic() < end, f"no {text!r} in the output after {seconds} s:\n{self.output()}"
            time.sleep(0.1)
        return self.output()

    def interrupt(self, number: int = signal.SIGINT, seconds: float = 40) -> int:
        """Sends the signal (by default that of Ctrl-C) and returns the exit code."""
        self.descendants()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=seconds)

    def descendants(self) -> list[psutil.Process]:
        """All processes below this one that this method has seen so far, ended ones included."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[process.pid] = process
        return list(self._seen.values())

    def running(self) -> list[psutil.Process]:
        """The descendants that still run. psutil recognizes a process id that the system has assigned again."""
        return [process for process in self._seen.values() if _command_line(process) is not None]

    def find(self, text: str) -> list[psutil.Process]:
        """The running descendants with `text` in their command line."""
        self.descendants()
        return [process for process in self._seen.values() if text in (_command_line(process) or "")]


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill the processes and wait until they have ended: until then they accept connections."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    end = time.monotonic() + 10
    while any(_command_line(process) is not None for process in processes):
        assert time.monotonic() < end, processes
        time.sleep(0.005)


def _command_line(process: psutil.Process) -> str | None:
    """The command line; None if the process has ended, which it may do during this call."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # also raised for a zombie
        pass
    return None


class Service(Program):
    """`python -m serve_app` with these models. `options` are command-line options, `limits` see `serve_config`.

    The default options are a local Ray without its dashboard, which starts 3 s sooner.
    """

    def __init__(
        self, models: Sequence[Config], *options: str, environment: dict[str, str] | None = None, **limits: Any
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            yaml.safe_dump(serve_config(models, **limits), file)
        self._config = Path(file.name)
        command = ["serve_app", "--config", file.name, "--port", str(self.port)]
        super().__init__([*command, *(options or ("--ray-address", "local", "--no-dashboard"))], **(environment or {}))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._config.unlink()

    def log(self) -> list[str]:
        """The lines in the logs of the model replicas and of the ingress."""
        files = (self.folder / "ray/session_latest/logs/serve").glob("replica_*.log")
        return [line for file in files for line in file.read_text().splitlines()]

    def wait_until_ready(self) -> None:
        self.wait_for_output("answers on")

    def haproxy(self) -> psutil.Process:
        """HAProxy's only process. When its configuration changes, a new one starts and the old one ends soon."""
        end = time.monotonic() + 20
        while len(found := self.find("haproxy.cfg")) != 1:
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found[0]


async def wait_until(condition: Callable[[], Awaitable[T]], seconds: float = 20, every_s: float = 0.1) -> T:
    """The first true result of an async condition. Fails with the last result when the time is over."""
    end = time.monotonic() + seconds
    while not (value := await condition()):
        assert time.monotonic() < end, f"still {value!r} after {seconds} s"
        await asyncio.sleep(every_s)
    return value


async def metric_totals(client: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    """The sum of each metric over all processes, by name (without `serve_app_`) and model."""
    totals: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            key = sample.name.removeprefix("serve_app_"), sample.labels.get("model", "")
            totals[key] = totals.get(key, 0) + sample.value
    return totals


async def wait_until_idle(client: httpx.AsyncClient, model: str) -> dict[tuple[str, str], float]:
    """The metrics once the model runs no request. Every process reports once a second: two reads must agree."""

    async def idle_metrics() -> dict[tuple[str, str], float] | None:
        first = await metric_totals(client)
        await asyncio.sleep(1.6)
        second = await metric_totals(client)
        busy = ("running_sequences", "queue_depth", "kv_usage_ratio", "active_requests")
        same = first["engine_generated_tokens_total", model] == second["engine_generated_tokens_total", model]
        return second if same and not any(second.get((key, model), 0) for key in busy) else None

    found = await wait_until(idle_metrics)
    assert found is not None
    return found


def logged_requests(log: Path) -> set[str]:
    """The ids, up to the first underscore, of the requests for which the toy model has computed a token."""
    return {line.split()[1].split("_")[0] for line in log.read_text().splitlines()}


def tokens_after(log: Path, cuts: dict[str, float]) -> dict[str, int]:
    """How many tokens the engine computed for each request id after the instant at which its client left.

    `log` is the file of the toy model's option `log`.
    """
    extra = dict.fromkeys(cuts, 0)
    for line in log.read_text().splitlines():
        at, name = line.split()
        name = name.split("_")[0]
        if name in cuts and float(at) > cuts[name]:
            extra[name] += 1
    return extra


async def model_status(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    models: Iterable[dict[str, Any]] = (await client.get("/ready")).json()["models"]
    return next(model for model in models if model["name"] == name)


async def model_state(client: httpx.AsyncClient, name: str) -> str:
    return str((await model_status(client, name))["state"])


async def stream_lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream that are not empty."""
    async for line in response.aiter_lines():
        if line:
            yield line


async def stream_events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The data of each server-sent event."""
    async for line in stream_lines(response):
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
