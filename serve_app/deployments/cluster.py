"""The Ray under the service: a reachable one, or one of our own that ends with us.

Ray reads its switches when it is imported, so that it is imported here only after they are set.
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

# A variable that the user has set stays as it is.
_ENVIRONMENT = {
    # Ray reports usage to its makers unless it is switched off.
    "RAY_USAGE_STATS_ENABLED": "0",
    # So does the model hub's library.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Without it Ray decides by what it finds in the home folder. Code runs for anyone who reaches Ray's ports, on
    # loopback for every user of the machine, so that Ray has to ask for the token in ~/.ray/auth_token.
    "RAY_AUTH_MODE": "token",
    # One event loop a replica and gRPC between deployments: 17 % more tokens a second at 8 and at 32 streams, on cores
    # that the model shares. Nothing here blocks a loop, which is what the default protects from.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Ray's controller checks its deployments ten times a second, and each check interrupts the model on a machine with
    # few cores: 3 to 7 % of the tokens at 32 streams.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray replaces a proxy after three failed checks, at every second pass of its control loop at most: with this period
    # a HAProxy that was killed is back after 4 to 5 s. Ray's default of 10 s leaves the service unreachable for 39 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.2",
    # Ray starts its workers with niceness 15, behind every other program. A step is two threads that wait for each
    # other: beside one busy process of the usual priority, steps took ten times as long.
    "RAY_worker_niceness": "0",
    # Ray Serve's own request log would be a line for every health check.
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
# Despite its name this decides on every system whether Ray listens on the network or on loopback only.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
# Tokens are small and pass by value; Ray's default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_PORT = 6379
_CONNECT_S = 5.0


class ClusterError(Exception):
    """There is no Ray to run on. The text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that runs the service, and whether we started it. `dashboard` is host:port, or ""."""

    dashboard: str
    ours: bool
    folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def asks_for_token(self) -> bool:
        return self.ours and os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ

    def stop(self, application: str) -> None:
        """Remove what we started: our own Ray as a whole; on a joined cluster the application, and Serve if unused."""
        import ray

        if not self.ours:
            with suppress(Exception):
                _remove(application)
        ray.shutdown()
        if self.folder is not None:
            self.folder.cleanup()


def _remove(application: str) -> None:
    """Delete one application. Ray Serve itself, which we started, goes unless others have deployed to it since."""
    from ray import serve

    if application:
        serve.delete(application)
    if not serve.status().applications:
        serve.shutdown()


def connect(wanted: str, longest_s: float) -> Cluster:
    """Join a cluster, or start one. `wanted` is `auto` (join if one is reachable), `local` (start), or an address.

    `longest_s` is how long a request may take. Raises ClusterError.
    """
    address = _running() if wanted == "auto" else None if wanted == "local" else wanted
    if address is not None and wanted != "auto":
        _reach(address)
    _set_unless_set(_ENVIRONMENT)
    return _start(longest_s) if address is None else _join(address)


def _join(address: str) -> Cluster:
    import ray

    try:
        context = ray.init(address=address, **_quiet())
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"the Ray cluster at {address} cannot be joined: {error}") from None
    if _serve_runs():
        ray.shutdown()
        raise ClusterError(
            f"Ray Serve runs on the cluster at {address} already, with a port of its own: use `serve deploy` there, "
            "or --ray-address local for a Ray of its own"
        )
    return Cluster(context.dashboard_url or "", ours=False)


def _start(longest_s: float) -> Cluster:
    _set_unless_set(_LOOPBACK_ONLY)
    _no_proxy_for_loopback()
    folder = _put_haproxy_in_front(longest_s)
    import ray

    try:
        context = ray.init(
            address="local", _node_ip_address="127.0.0.1", object_store_memory=_OBJECT_STORE_BYTES, **_quiet()
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
    """All of this Ray is on loopback, where a proxy from the environment cannot reach it."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*hosts, *(host for host in _LOOPBACK_HOSTS if host not in hosts)])


def _put_haproxy_in_front(longest_s: float) -> tempfile.TemporaryDirectory[str] | None:
    """Have Ray Serve use HAProxy if it is installed. Returns the folder with its files, to remove after Ray."""
    binary = haproxy.find() if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1" else None
    if binary is None:
        return None
    # HAProxy's admin socket can redirect the service: only this user may enter the folder.
    folder = tempfile.TemporaryDirectory(prefix="sa-", dir="/tmp", ignore_cleanup_errors=True)
    variables = haproxy.environment(binary, Path(folder.name), longest_s)
    start = variables.pop("RAY_SERVE_HAPROXY_BINARY_PATH")
    if not os.access(start, os.X_OK):  # /tmp is mounted without permission to run programs
        folder.cleanup()
        return None
    _set_unless_set(variables)
    os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = start  # it runs the binary that the user named, if any
    return folder


def _set_unless_set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.WARNING}


def _running() -> str | None:
    """The cluster that Ray's own tools would use: by RAY_ADDRESS, else the last one started on this machine."""
    named = os.environ.get("RAY_ADDRESS")
    if named:
        _reach(named)
        return named
    note = Path(_temporary_folder()) / "ray" / "ray_current_cluster"
    with suppress(OSError, ClusterError):
        address = note.read_text().strip()
        _reach(address)
        return address
    return None


def _temporary_folder() -> str:
    """Where Ray keeps its sessions."""
    return os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"


def _reach(address: str) -> None:
    """Raises ClusterError if nothing listens there; Ray itself would try for minutes."""
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
