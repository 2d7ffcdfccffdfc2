"""`python -m serve_app`: the whole service on this machine, until Ctrl-C.

Starts a local Ray when none is reachable, deploys the configuration to it, says how far the model is, and
takes away again what it brought.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from serve_app.config import ConfigError, ServeFile, load_serve_file

# Before Ray is imported, which reads them once. A value that the user has set stands.
_ENVIRONMENT = {
    # Ray reports usage to its makers unless told otherwise.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Left unset, Ray decides by what it finds in the home folder. With the dashboard's API comes the right to
    # run code, on loopback for every user of the machine, so it asks for the token in ~/.ray.
    "RAY_AUTH_MODE": "token",
    # Serve's own request log would be a line for every health check.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Tokens are tiny and pass by value; Ray's default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_RAY_PORT = 6379
_CONNECT_S = 5.0
_LOOK_S = 0.2


class StartError(Exception):
    """The service cannot start; the text says why and what to do."""


class Progress:
    """One line that changes on a terminal; one line for each change elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = ""
        self._began = time.monotonic()

    def show(self, text: str) -> None:
        elapsed = f"[{time.monotonic() - self._began:5.1f} s] "
        if self._live:
            print(f"\r\x1b[2K{elapsed}{text}", end="", file=sys.stderr, flush=True)
        elif text != self._shown:
            print(elapsed + text, file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        """Let what is printed next begin on a line of its own."""
        if self._live and self._shown:
            print(file=sys.stderr, flush=True)
        self._shown = ""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    _on_signals(_interrupt)
    progress = Progress()
    try:
        file = load_serve_file(arguments.config)
        _check_port(arguments.host, arguments.port)
        return _serve(arguments, file, progress)
    except (ConfigError, StartError) as error:
        progress.end()
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.end()
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app",
        description="Run the LLM service on this machine: a local Ray (or the one that is reachable), the graph of the "
        "configuration file, an HTTP address. Ctrl-C stops it and everything it started.",
    )
    parser.add_argument("--config", default="serve_config.yaml", help="Ray Serve config file (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--ray-address",
        default="auto",
        help="auto: the Ray cluster that is reachable, or else a new local one; local: always a new one; "
        "or the address of a cluster (default: %(default)s)",
    )
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; a port is 1 to 65535")
    return int(text)


def _check_port(host: str, port: int) -> None:
    """Ray would only say that its proxy did not start."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error}; choose another with --port") from None


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that carries the service, and whether it is ours to stop."""

    dashboard: str
    ours: bool


def _serve(arguments: argparse.Namespace, file: ServeFile, progress: Progress) -> int:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    progress.show("starting Ray")
    cluster = _connect(arguments.ray_address)
    _on_signals(_interrupt)  # Ray has put a handler of its own there
    try:
        progress.show("starting Ray Serve")
        _deploy(arguments, file, progress)
        _print_banner(arguments, file, cluster.dashboard)
        threading.Event().wait()
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C would leave processes behind.
        _on_signals(signal.SIG_IGN)
        progress.show("stopping")
        _stop(cluster)
        progress.show("stopped")
        progress.end()


def _connect(address: str) -> Cluster:
    """Join a Ray cluster, or start one."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address not in ("auto", "local"):
        _check_cluster(address)
    if address != "local":
        try:
            context = ray.init(address=address, **options)
        except ConnectionError as error:
            if address != "auto":
                raise StartError(f"no Ray cluster answers at {address}: {error}") from None
        else:
            if _serve_runs():
                ray.shutdown()
                raise StartError(
                    "Ray Serve runs on this cluster already, with a port of its own: use `serve deploy` there, "
                    "or --ray-address local for a Ray apart from it"
                )
            return Cluster(context.dashboard_url or "", ours=False)
    # On loopback: a cluster of one machine has nobody to talk to outside.
    context = ray.init(
        address="local", _node_ip_address="127.0.0.1", object_store_memory=_OBJECT_STORE_BYTES, **options
    )
    return Cluster(context.dashboard_url or "", ours=True)


def _check_cluster(address: str) -> None:
    """Ray itself would try for minutes."""
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or _RAY_PORT), timeout=_CONNECT_S):
            pass
    except (OSError, ValueError) as error:
        raise StartError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or use "
            "--ray-address local"
        ) from None


def _serve_runs() -> bool:
    from ray.util import list_named_actors

    return any(actor["namespace"] == "serve" for actor in list_named_actors(all_namespaces=True))


def _deploy(arguments: argparse.Namespace, file: ServeFile, progress: Progress) -> None:
    """Deploy, and show what `/ready` says until it says yes. Raises StartError when the deployment fails."""
    from ray import serve

    from serve_app.app import build

    for name in ("ray.serve", "ray.serve._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    failure: list[Exception] = []

    def run() -> None:
        try:
            serve.run(build(file.args), name=file.name, route_prefix=file.route_prefix)
        except Exception as error:  # noqa: BLE001 - whatever it is, the operator is told
            failure.append(error)

    deployment = threading.Thread(target=run, daemon=True)
    deployment.start()
    waiting: list[str] | None = []
    while deployment.is_alive() or waiting is None or waiting:
        if failure:
            raise StartError(f"the deployment failed: {'; '.join(waiting or []) or _reason(failure[0])}")
        time.sleep(_LOOK_S)
        waiting = _waiting(arguments, file)
        progress.show("starting the graph" if waiting is None else "; ".join(waiting))
    progress.end()


def _waiting(arguments: argparse.Namespace, file: ServeFile) -> list[str] | None:
    """What the models that cannot answer yet are doing; None while nobody is there to say."""
    try:
        with urllib.request.urlopen(_url(arguments, file) + "/ready", timeout=2):
            return []
    except urllib.error.HTTPError as error:
        with suppress(ValueError, KeyError):
            models = json.load(error)["models"]
            return [f"{m['name']}: {m['detail']}" for m in models if m["state"] not in ("ready", "asleep")]
    except OSError:
        pass
    return None


def _reason(error: Exception) -> str:
    """The line of Ray's report that an operator can act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error: " in line or "NotEnoughMemory: " in line:
            return line.split(": ", 1)[1]
    return lines[-1] if lines else repr(error)


def _stop(cluster: Cluster) -> None:
    """Take away what we brought. A Ray of our own goes down as a whole, which needs no care for its parts."""
    import ray
    from ray import serve

    if not cluster.ours:
        with suppress(Exception):
            serve.shutdown()
    ray.shutdown()


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """SIGTERM, and SIGINT: a shell that starts us in the background leaves that one ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _url(arguments: argparse.Namespace, file: ServeFile) -> str:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    return f"http://{host}:{arguments.port}{file.route_prefix.rstrip('/')}"


def _print_banner(arguments: argparse.Namespace, file: ServeFile, dashboard: str) -> None:
    url, model = _url(arguments, file), file.args.models[0].name
    stream = json.dumps({"prompt": "The future of artificial intelligence is", "max_tokens": 40})
    chat = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    print(
        f"\nserve_app answers on {url}   (Ctrl-C stops it)\n"
        f"Models: {', '.join(m.name for m in file.args.models)}"
        + (f"   Ray dashboard: http://{dashboard}" if dashboard else "")
        + f"\n\nStream tokens:\n  curl -N {url}/generate_stream -H 'content-type: application/json' -d '{stream}'\n"
        f"\nChat:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{chat}'\n",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
