"""Ray clusters of several nodes on this machine. Each node is a `ray start` with an address and processes of its own.

`ray.cluster_utils.Cluster` would start the nodes in the environment of the tests, and write the address of its cluster
to the file by which all other programs of the machine find theirs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from infra_pulumi import rayservice
from serve_app.deployments import haproxy
from tests.graph.service import PROXIES, Config, Program, free_port, kill, serve_config
from tests.redis_server import RedisServer

_START = ("ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000")
_LONGEST_S = 120


@contextmanager
def node_environment(proxy: str) -> Iterator[dict[str, str]]:
    """The environment of all nodes, as the manifests have it. `proxy` is Ray Serve's: `haproxy` or `python`."""
    variables = {one["name"]: one["value"] for one in rayservice.environment(_LONGEST_S) if "value" in one}
    if proxy == "python":
        yield {**variables, **PROXIES["python"]}
        return
    binary = haproxy.find()
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="sa") as folder:
        yield {**variables, **haproxy.environment(binary, Path(folder), _LONGEST_S)}


@contextmanager
def fault_tolerance() -> Iterator[dict[str, str]]:
    """Run Redis. With these variables the head keeps its state there, and workers wait for a new head."""
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(Path(folder))
        try:
            yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        finally:
            redis.kill()


class Node(Program):
    """A node of a Ray cluster, started with these options of `ray start`. `proxy` is the URL of its HTTP proxy."""

    def __init__(self, environment: dict[str, str], *options: str, http_port: int) -> None:
        super().__init__([*_START, *options], **environment)
        self.proxy = f"http://127.0.0.1:{http_port}"

    def wait_until_started(self) -> None:
        self.wait_for_output("Ray runtime started")

    @property
    def id(self) -> str:
        (raylet,) = self.find("--node_id=")
        return next(word for word in raylet.cmdline() if word.startswith("--node_id=")).removeprefix("--node_id=")

    def lose(self) -> None:
        """Kill every process of the node, as if its machine was lost."""
        kill(self._all())

    def send_to_all(self, number: int) -> None:
        """Send a signal to every process of the node. After SIGSTOP it stands still as a crashed machine does."""
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _all(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *self.descendants()]


@dataclass(frozen=True)
class Ports:
    """The ports of a head. A head that replaces another one has the same."""

    ray: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)


class Head(Node):
    """The head of a cluster, with its dashboard."""

    def __init__(self, environment: dict[str, str], *options: str, ports: Ports | None = None) -> None:
        self.ports = ports or Ports()
        super().__init__(
            environment,
            *("--head", "--node-ip-address=127.0.0.1", f"--port={self.ports.ray}"),
            *(f"--dashboard-port={self.ports.dashboard}", *options),
            http_port=self.ports.http,
        )
        self.dashboard = f"http://127.0.0.1:{self.ports.dashboard}"

    @property
    def address(self) -> str:
        """Of the cluster, for Ray's tools. Other clusters can run on the same machine."""
        return f"127.0.0.1:{self.ports.ray}"

    def tool(self, module: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a module of Ray or of the service as a user of this cluster does."""
        return subprocess.run(
            [sys.executable, "-m", module, *command],
            capture_output=True, text=True, timeout=180, check=False, env={**self.environment, **environment},
        )  # fmt: skip

    def serve(self, *command: str) -> subprocess.CompletedProcess[str]:
        """The `serve` tool, against this cluster."""
        return self.tool("ray.serve.scripts", *command, f"--address={self.dashboard}")

    def drain(self, node: Node, deadline_s: int) -> None:
        """Announce that the node will be lost, as cluster/image/drain does when its pod has to stop."""
        done = self.tool(
            *("ray.scripts.scripts", "drain-node", f"--address={self.address}", f"--node-id={node.id}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"),
            f"--deadline-remaining-seconds={deadline_s}",
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def python(self, program: str) -> None:
        """Run a Python program. RAY_ADDRESS is this cluster."""
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)

    def write(self, *models: Config, **options: Any) -> Path:
        """A Serve config file with these models and the port of this cluster."""
        file = self.folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(serve_config(models, port=self.ports.http, **options)))
        return file

    def deploy(self, *models: Config, **options: Any) -> None:
        done = self.serve("deploy", str(self.write(*models, **options)))
        assert done.returncode == 0, done.stderr

    async def actors(self) -> dict[str, dict[str, float]]:
        """The resources that each live model replica reserves, by deployment."""
        headers = {"authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        params = {"detail": "true", "filter_keys": "state", "filter_predicates": "=", "filter_values": "ALIVE"}
        async with httpx.AsyncClient(base_url=self.dashboard, headers=headers) as client:
            answer = (await client.get("/api/v0/actors", params=params, timeout=30)).json()
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return {row["name"].split("#")[1]: row["required_resources"] for row in rows if "#model-" in row["name"]}


class Worker(Node):
    """A further node of the cluster of `head`, with its own address 127.0.0.`number` and its own port of the proxy."""

    def __init__(self, head: Head, number: int, *options: str) -> None:
        http_port = free_port()
        inherited = {
            name: value
            for name, value in head.environment.items()
            if name.startswith(("RAY_", "HF_")) and name not in ("RAY_TMPDIR", "RAY_REDIS_ADDRESS")
        }
        super().__init__(
            {**inherited, "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(http_port)},
            *(f"--address={head.address}", f"--node-ip-address=127.0.0.{number}", *options),
            # Several raylets on one machine: each has its own folder, and the system chooses the ports.
            *("--temp-dir={folder}/ray", "--dashboard-agent-listen-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0"),
            http_port=http_port,
        )
