"""Runs the whole service as a user does, `python -m serve_app`, with models that need no weights."""

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
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "serve_config.yaml"
# What stands in front, by what chooses it.
FRONTS = {"haproxy": {}, "python": {"RAY_SERVE_ENABLE_HA_PROXY": "0"}}
Config = dict[str, Any]

DEPLOYMENT: Config = {
    "num_replicas": 1,
    "max_ongoing_requests": 64,
    "max_queued_requests": 64,
    "health_check_period_s": 1,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 1,
}


def model(name: str, source: str = "builtin:toy", deployment: Config | None = None, **sections: Any) -> Config:
    """A model of the configuration file, on a sliver of a core so that many fit on a small machine."""
    resources = {"num_cpus": 0.01, **sections.pop("resources", {})}
    # A toy repeats its prompt, so that every guess would be right and no stream would take its time.
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


def sleeper(name: str, source: str, downscale_to_zero_delay_s: float) -> Config:
    """A model at `min_replicas: 0`."""
    autoscaling = {
        "min_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": downscale_to_zero_delay_s,
        "look_back_period_s": 11,
    }
    return model(name, source, deployment={"num_replicas": None, "autoscaling": autoscaling})


def serve_file(
    models: Sequence[Config],
    port: int = 8000,
    ingress: Config | None = None,
    telemetry: Config | None = None,
    **limits: Any,
) -> Config:
    """`ingress` changes the ingress's deployment."""
    deployment = {**DEPLOYMENT, "max_ongoing_requests": 1024, **(ingress or {})}
    args = {
        "ingress": {"deployment": deployment},
        "limits": limits,
        "telemetry": telemetry or {},
    }
    application = {
        "name": "serve_app",
        "route_prefix": "/",
        "import_path": "serve_app.app:build",
        "args": {**args, "models": list(models)},
    }
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}


def caller(service: Service) -> httpx.AsyncClient:
    """A client without bounds of its own, and a connection for every request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits)


def free_port() -> int:
    """Between the ports that Ray's workers take and those that the system hands out, to Ray among others."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Program:
    """A command with a Ray of its own: temporary folder, token, output files. Ends with everything it started."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        # Short: Ray puts sockets into it, and their paths may not pass 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="sa"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            **environment,
        }
        self.output = self.folder / "output"
        self._seen: dict[int, psutil.Process] = {}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
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
        finally:  # whatever Ctrl-C came to
            for process in self.left():
                process.kill()
            self.process.wait(timeout=10)
            shutil.rmtree(self.folder, ignore_errors=True)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 90) -> str:
        """The output once `text` stands in it."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < end, f"not said after {seconds} s: {text}\n{self.said()}"
            time.sleep(0.1)
        return self.said()

    def interrupt(self, number: int = signal.SIGINT, seconds: float = 40) -> int:
        """Ctrl-C, and the exit code it leads to."""
        self.family()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=seconds)

    def family(self) -> list[psutil.Process]:
        """Every process that was started below this one, as far as it has been looked at."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[process.pid] = process
        return list(self._seen.values())

    def left(self) -> list[psutil.Process]:
        """Those that still run. psutil knows a process number that was given anew."""
        return [process for process in self._seen.values() if _said(process) is not None]

    def find(self, words: str) -> list[psutil.Process]:
        self.family()
        return [process for process in self._seen.values() if words in (_said(process) or "")]


def _said(process: psutil.Process) -> str | None:
    """Its command line while it runs. Whatever is looked at may end meanwhile."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # which a zombie is too
        pass
    return None


class Service(Program):
    """`python -m serve_app` over these models. `options` go to the command line."""

    def __init__(
        self, models: Sequence[Config], *options: str, environment: dict[str, str] | None = None, **limits: Any
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            yaml.safe_dump(serve_file(models, **limits), file)
        self._config = Path(file.name)
        command = ["serve_app", "--config", file.name, "--port", str(self.port)]
        super().__init__([*command, *(options or ("--ray-address", "local"))], **(environment or {}))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._config.unlink()


async def metrics(client: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    """The sum over processes of every series, by name without `serve_app_` and model."""
    totals: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            key = sample.name.removeprefix("serve_app_"), sample.labels.get("model", "")
            totals[key] = totals.get(key, 0) + sample.value
    return totals


def made_after(log: Path, cuts: dict[str, float]) -> list[int]:
    """For each client who left at an instant, the number of tokens that the engine made for it later."""
    extra = dict.fromkeys(cuts, 0)
    for line in log.read_text().splitlines():
        at, name = line.split()
        name = name.split("_")[0]
        if name in cuts and float(at) > cuts[name]:
            extra[name] += 1
    return list(extra.values())


async def until(condition: Callable[[], Any], seconds: float = 20, every_s: float = 0.1) -> Any:
    """The first true value of an async condition. Fails with the last one when the time is over."""
    end = time.monotonic() + seconds
    while not (value := await condition()):
        assert time.monotonic() < end, f"still {value!r} after {seconds} s"
        await asyncio.sleep(every_s)
    return value


async def idle(client: httpx.AsyncClient, name: str) -> dict[tuple[str, str], float]:
    """The metrics once nobody is being served: pushed by every process each second, so two looks must agree."""

    async def look() -> dict[tuple[str, str], float] | None:
        first = await metrics(client)
        await asyncio.sleep(1.6)
        second = await metrics(client)
        busy = ("running_sequences", "queue_depth", "kv_usage_ratio", "active_requests")
        same = first["engine_generated_tokens_total", name] == second["engine_generated_tokens_total", name]
        return second if same and not any(second.get((key, name), 0) for key in busy) else None

    found: dict[tuple[str, str], float] = await until(look)
    return found


async def state(client: httpx.AsyncClient, name: str) -> str:
    models = (await client.get("/ready")).json()["models"]
    return str(next(m["state"] for m in models if m["name"] == name))


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream that say something."""
    async for line in response.aiter_lines():
        if line:
            yield line


async def frames_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The data of every frame."""
    async for line in lines(response):
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
