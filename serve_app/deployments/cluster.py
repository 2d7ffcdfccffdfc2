"""The Ray under the service: one that is reachable, or one of our own that ends with us.

Ray reads its switches when it is imported, so it is imported here only once they are set.
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

# A value that the user has set stands.
_ENVIRONMENT = {
    # Ray reports usage to its makers unless told otherwise.
    "RAY_USAGE_STATS_ENABLED": "0",
    # So does the model hub's library.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Left unset, Ray decides by what it finds in the home folder. Whoever reaches Ray's ports may run code, on
    # loopback every user of the machine, so it asks for the token in ~/.ray/auth_token.
    "RAY_AUTH_MODE": "token",
    # One event loop a replica and gRPC between deployments: 17 % more tokens a second at 8 and at 32 streams, on cores
    # that the model shares. Nothing here blocks a loop, which is what the default protects from.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Ray's controller looks after its deployments ten times a second, and each look interrupts the model on a machine
    # with few cores: 3 to 7 % of the tokens at 32 streams.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray's workers stand back behind every other program (niceness 15). A step is two threads in lock-step, and where
    # one is kept waiting both are: beside one busy process at the usual priority, steps took ten times as long.
    "RAY_worker_niceness": "0",
    # Serve's own request log would be a line for every health check.
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
# Despite its name this decides on every system whether Ray listens on the network or on loopback only.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Tokens are tiny and pass by value; Ray's default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_PORT = 6379
_CONNECT_S = 5.0


class ClusterError(Exception):
    """There is no Ray to run on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that carries the service, and whether it is ours to stop. `dashboard` is host:port, or ""."""

    dashboard: str
    ours: bool
    folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def asks_for_token(self) -> bool:
        return self.ours and os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ

    def stop(self) -> None:
        """Take away what we brought. A Ray of our own goes down as a whole, which needs no care for its parts."""
        import ray
        from ray import serve

        if not self.ours:
            with suppress(Exception):
                serve.shutdown()
        ray.shutdown()
        if self.folder is not None:
            self.folder.cleanup()


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
            "or --ray-address local for a Ray apart from it"
        )
    return Cluster(context.dashboard_url or "", ours=False)


def _start(longest_s: float) -> Cluster:
    _set_unless_set(_LOOPBACK_ONLY)
    folder = _put_haproxy_in_front(longest_s)
    import ray

    context = ray.init(
        address="local", _node_ip_address="127.0.0.1", object_store_memory=_OBJECT_STORE_BYTES, **_quiet()
    )
    return Cluster(context.dashboard_url or "", ours=True, folder=folder)


def _put_haproxy_in_front(longest_s: float) -> tempfile.TemporaryDirectory[str] | None:
    """Have Ray Serve use HAProxy where it is there. Returns the folder with its files, which goes when the Ray goes."""
    binary = haproxy.find() if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1" else None
    if binary is None:
        return None
    # Whoever reaches HAProxy's admin socket may redirect the service: only we may enter the folder.
    folder = tempfile.TemporaryDirectory(prefix="sa-", dir="/tmp", ignore_cleanup_errors=True)
    variables = haproxy.environment(binary, Path(folder.name), longest_s)
    start = variables.pop("RAY_SERVE_HAPROXY_BINARY_PATH")
    if not os.access(start, os.X_OK):  # no program may run from /tmp here
        folder.cleanup()
        return None
    _set_unless_set(variables)
    os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = start  # which runs the one that the user named, if any
    return folder


def _set_unless_set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.WARNING}


def _running() -> str | None:
    """The cluster that Ray's own tools would take: by RAY_ADDRESS, else the last one started on this machine."""
    named = os.environ.get("RAY_ADDRESS")
    if named:
        _reach(named)
        return named
    temporary = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    note = Path(temporary) / "ray" / "ray_current_cluster"
    with suppress(OSError, ClusterError):
        address = note.read_text().strip()
        _reach(address)
        return address
    return None


def _reach(address: str) -> None:
    """Raises ClusterError when nobody listens there; Ray itself would try for minutes."""
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
