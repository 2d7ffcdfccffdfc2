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
import urllib.request
from contextlib import suppress
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

    def done(self, text: str) -> None:
        self.show(text)
        if self._live:
            print(file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # Also for SIGINT: a shell that starts us in the background leaves it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    progress = Progress()
    try:
        file = load_serve_file(arguments.config)
        _check_port(arguments.host, arguments.port)
        return _serve(arguments, file, progress)
    except (ConfigError, StartError) as error:
        progress.done("stopped")
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.done("stopped")
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


def _serve(arguments: argparse.Namespace, file: ServeFile, progress: Progress) -> int:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    progress.show("starting Ray")
    ours, dashboard = _connect(arguments.ray_address)
    deployed = False
    try:
        progress.show("starting Ray Serve")
        deployed = True
        _deploy(arguments, file, progress)
        _print_banner(arguments, file, dashboard)
        threading.Event().wait()
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C would leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        progress.show("stopping")
        _stop(file, ours, deployed)
        progress.done("stopped")


def _connect(address: str) -> tuple[bool, str]:
    """Join a Ray cluster or start one: whether it is ours to stop, and its dashboard's address."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if address != "local":
        try:
            context = ray.init(address=address, **options)
            return False, context.dashboard_url or ""
        except ConnectionError as error:
            if address != "auto":
                raise StartError(f"no Ray cluster answers at {address} ({error})") from None
    # On loopback: a cluster of one machine has nobody to talk to outside.
    context = ray.init(
        address="local", _node_ip_address="127.0.0.1", object_store_memory=_OBJECT_STORE_BYTES, **options
    )
    return True, context.dashboard_url or ""


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
        except Exception as error:
            failure.append(error)

    deployment = threading.Thread(target=run, daemon=True)
    deployment.start()
    while not failure and (deployment.is_alive() or not _ready(arguments, file, progress)):
        deployment.join(timeout=0.2)
        time.sleep(0.1)
        _ready(arguments, file, progress)
    if failure:
        raise StartError(f"the deployment failed: {_reason(failure[0])}")


def _ready(arguments: argparse.Namespace, file: ServeFile, progress: Progress) -> bool:
    """Whether every model can answer or be woken; shows what the others are doing."""
    try:
        with urllib.request.urlopen(_url(arguments, file) + "/ready", timeout=2) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        with suppress(ValueError, KeyError):
            waiting = [model for model in json.load(error)["models"] if model["state"] not in ("ready", "asleep")]
            progress.show("; ".join(f"{model['name']}: {model['detail']}" for model in waiting))
    except OSError:
        progress.show("starting the graph")
    return False


def _reason(error: Exception) -> str:
    """The line of Ray's report that an operator can act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error: " in line or "NotEnoughMemory: " in line:
            return line.split(": ", 1)[1]
    return lines[-1] if lines else repr(error)


def _stop(file: ServeFile, ours: bool, deployed: bool) -> None:
    import ray
    from ray import serve

    with suppress(Exception):
        if ours:
            serve.shutdown()
        elif deployed:
            serve.delete(file.name)
    ray.shutdown()


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
