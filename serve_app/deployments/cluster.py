"""Joins a running Ray cluster, or starts a local one that ends with the service.

Ray reads its environment variables when it is imported. Therefore functions import it after the variables are set.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve_app.deployments import haproxy
from serve_app.engines.vllm.shared_memory import remove_left_segments

# The time in which the processes of a local Ray end after it was stopped.
_KILLED_S = 10.0

# A variable that the user has set keeps its value.
_ENVIRONMENT = {
    # Disables usage reports to the developers of Ray.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Disables usage reports of huggingface_hub.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Ray executes code for every client of its ports, also for every user of the machine on loopback. Therefore it must
    # require the token in ~/.ray/auth_token.
    "RAY_AUTH_MODE": "token",
    # One event loop per replica and gRPC between deployments: 17 % more tokens per second at 8 and at 32 streams, on
    # cores that the model shares. The default is for code that blocks an event loop, which the service does not.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Ray's controller checks its deployments ten times a second, and each check interrupts the model on a machine with
    # few cores: 2.5 % of the tokens at 32 streams. Five times a second costs 0.5 %. Twice a second delays the first
    # token of a model without a replica by 0.4 s more.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
    # Ray replaces a proxy after three failed health checks, each of which takes two passes of its control loop: with
    # this period a HAProxy that was killed is back after 4 to 5 s. Ray's default of 10 s leaves the service without a
    # proxy for up to 39 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.2",
    # Ray starts its workers with niceness 15. The two threads of a step wait for each other: beside one busy process of
    # niceness 0, steps took ten times as long.
    "RAY_worker_niceness": "0",
    # Ray Serve's request log has a line for every health check.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # The HTTP server of Ray Serve's proxies and replicas would send chunks to HTTP/1.0.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.deployments.http_server.middlewares",
}
# Despite its name, this variable makes Ray listen on loopback only on every system.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
# The service stores no large objects. Ray's default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_PORT = 6379
_CONNECT_S = 5.0


class ClusterError(Exception):
    """No Ray cluster can be used. The message has the reason and what to do."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray cluster of the service. `ours` is whether this process started it; `dashboard` is host:port, or ""."""

    dashboard: str
    ours: bool
    folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def asks_for_token(self) -> bool:
        return self.ours and os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ

    def stop(self, application: str) -> None:
        """Stop a local Ray. On a joined cluster, delete the application, and stop Ray Serve if it has no other one."""
        import ray

        if not self.ours:
            with suppress(Exception):
                _remove(application)
        ray.shutdown()
        if self.ours:
            remove_left_segments(_KILLED_S)
        if self.folder is not None:
            self.folder.cleanup()


def _remove(application: str) -> None:
    """Delete one application, and stop Ray Serve, which this process started, if it has no other application."""
    from ray import serve

    if application:
        serve.delete(application)
    if not serve.status().applications:
        serve.shutdown()


def connect(wanted: str, longest_s: float, dashboard: bool = True) -> Cluster:
    """Join a cluster, or start one. `wanted` is `auto` (join if one is reachable), `local` (start), or an address.

    `longest_s` is the maximum duration of a request in seconds. `dashboard` is whether a Ray that is started has its
    dashboard. Raises ClusterError.
    """
    address = _running() if wanted == "auto" else None if wanted == "local" else wanted
    if address is not None and wanted != "auto":
        _reach(address)
    _set_unless_set(_ENVIRONMENT)
    return _start(longest_s, dashboard) if address is None else _join(address)


def _join(address: str) -> Cluster:
    import ray

    try:
        context = ray.init(address=address, **_quiet())
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"the Ray cluster at {address} cannot be joined: {error}") from None
    if _serve_runs():
        ray.shutdown()
        raise ClusterError(
            f"Ray Serve runs on the cluster at {address} with its own port: use `serve deploy` there, "
            "or --ray-address local to start a local Ray"
        )
    return Cluster(context.dashboard_url or "", ours=False)


def _start(longest_s: float, dashboard: bool) -> Cluster:
    _set_unless_set(_LOOPBACK_ONLY)
    _no_proxy_for_loopback()
    folder = _put_haproxy_in_front(longest_s)
    import ray

    try:
        context = ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=None if dashboard else False,  # None: if its packages are installed
            **_quiet(),
        )
    except Exception as error:
        ray.shutdown()
        if folder is not None:
            folder.cleanup()
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]
        raise ClusterError(
            f"Ray did not start: {reason}; on a busy machine it can take too long: try again. Its logs are in "
            f"{_temporary_folder()}/ray/session_latest/logs"
        ) from error
    return Cluster(context.dashboard_url or "", ours=True, folder=folder)


def _no_proxy_for_loopback() -> None:
    """Exclude loopback from the proxies of the environment, which cannot reach a local Ray."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*hosts, *(host for host in _LOOPBACK_HOSTS if host not in hosts)])


def _put_haproxy_in_front(longest_s: float) -> tempfile.TemporaryDirectory[str] | None:
    """Make Ray Serve use HAProxy if it is installed. Returns the folder of its files, to delete after Ray."""
    binary = haproxy.find() if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1" else None
    if binary is None:
        return None
    # HAProxy's admin socket can redirect requests. Therefore only this user has access to the folder.
    folder = tempfile.TemporaryDirectory(prefix="sa-", dir="/tmp", ignore_cleanup_errors=True)
    variables = haproxy.environment(binary, Path(folder.name), longest_s)
    start = variables.pop("RAY_SERVE_HAPROXY_BINARY_PATH")
    if not os.access(start, os.X_OK):  # /tmp is mounted without permission to run programs
        folder.cleanup()
        return None
    _set_unless_set(variables)
    os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = start  # it runs the binary that the user has set
    return folder


def _set_unless_set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.WARNING}


def _running() -> str | None:
    """The address of the cluster in RAY_ADDRESS, else of the last cluster started on this machine."""
    configured = os.environ.get("RAY_ADDRESS")
    if configured:
        _reach(configured)
        return configured
    note = Path(_temporary_folder()) / "ray" / "ray_current_cluster"
    with suppress(OSError, ClusterError):
        address = note.read_text().strip()
        _reach(address)
        return address
    return None


def _temporary_folder() -> str:
    """The folder in which Ray keeps its sessions."""
    return os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"


def _reach(address: str) -> None:
    """Raises ClusterError if nothing listens at the address. Ray itself would retry for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or _PORT), timeout=_CONNECT_S):
            pass
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or use "
            "--ray-address local for one that ends with the service"
        ) from None


def _serve_runs() -> bool:
    from ray.util import list_named_actors

    return any(actor["namespace"] == "serve" for actor in list_named_actors(all_namespaces=True))
