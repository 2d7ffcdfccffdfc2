"""The whole service on this machine, until Ctrl-C.

Starts a local Ray when none is reachable, deploys the configuration to it, says how far the model is, and
takes away again what it brought.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from serve_app.config import ConfigError, ServeFile, load_serve_file
from serve_app.deployments.cluster import Cluster, ClusterError, connect

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


@dataclass(frozen=True, slots=True)
class Address:
    """Where the service listens."""

    host: str
    port: int

    def check(self) -> None:
        """Raises StartError; Ray would only say that its proxy did not start."""
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise StartError(f"cannot listen on {self.host}:{self.port}: {error}; choose another with --port") from None

    def url(self, route_prefix: str) -> str:
        """As it is reached from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}{route_prefix.rstrip('/')}"


_interrupted = threading.Event()


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    _on_signals(_interrupt)
    progress = Progress()
    try:
        file = load_serve_file(arguments.config)
        address = Address(arguments.host or file.http_options.host, arguments.port or file.http_options.port)
        address.check()
        return _serve(arguments.ray_address, address, file, progress)
    except KeyboardInterrupt:
        progress.end()
        return 130
    except Exception as error:
        progress.end()
        if _interrupted.is_set():  # other people's code, interrupted, fails as it likes
            return 130
        if not isinstance(error, ConfigError | ClusterError | StartError):
            raise
        print(f"serve_app: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app",
        description="Run the LLM service on this machine: a local Ray (or the one that is reachable), the graph of the "
        "configuration file, an HTTP address. Ctrl-C stops it and everything it started.",
    )
    parser.add_argument("--config", default="serve_config.yaml", help="Ray Serve config file (default: %(default)s)")
    parser.add_argument("--host", help="address to listen on (default: the file's, 127.0.0.1)")
    parser.add_argument("--port", type=_port, help="port to listen on (default: the file's, 8000)")
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


def _serve(ray_address: str, address: Address, file: ServeFile, progress: Progress) -> int:
    progress.show("starting Ray")
    cluster = _connect(ray_address, file.args.limits.request_timeout_s)
    try:
        progress.show("starting Ray Serve")
        _deploy(address, file, progress)
        print(_banner(address.url(file.route_prefix), file, cluster), flush=True)
        threading.Event().wait()
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C would leave processes behind.
        _on_signals(signal.SIG_IGN)
        progress.show("stopping")
        cluster.stop()
        progress.show("stopped")
        progress.end()


def _connect(address: str, longest_s: float) -> Cluster:
    """Join or start Ray. A signal waits until it is there: half a Ray could not be taken away again."""
    signals: list[int] = []
    _on_signals(lambda number, _: signals.append(number))
    try:
        cluster = connect(address, longest_s)
    finally:
        _on_signals(_interrupt)  # Ray too puts a handler of its own there
    if signals:
        cluster.stop()
        raise KeyboardInterrupt
    return cluster


def _deploy(address: Address, file: ServeFile, progress: Progress) -> None:
    """Deploy, and show how far the models are until they can answer. Raises StartError when the deployment fails."""
    from ray import serve

    from serve_app.app import build
    from serve_app.deployments.watch import Watch

    for name in ("ray.serve", "ray.serve._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    serve.start(http_options={"host": address.host, "port": address.port})
    failure: list[Exception] = []

    def run() -> None:
        try:
            serve.run(build(file.args), name=file.name, route_prefix=file.route_prefix)
        except Exception as error:  # noqa: BLE001 - whatever it is, the operator is told
            failure.append(error)

    deployment = threading.Thread(target=run, daemon=True)
    deployment.start()
    watch = Watch(file.name, file.args.models)
    url = address.url(file.route_prefix)
    stages: list[str] | None = None
    while deployment.is_alive() or stages is None or stages or not _ready(url, file):
        if _interrupted.is_set():  # and may have been swallowed by other people's code
            raise KeyboardInterrupt
        time.sleep(_LOOK_S)
        failed = bool(failure)
        stages = watch.waiting()
        if failed:
            raise StartError(f"the deployment failed: {'; '.join(stages or []) or _reason(failure[0])}")
        progress.show("starting the graph" if stages is None else "; ".join(stages))
    progress.end()


def _ready(url: str, file: ServeFile) -> bool:
    """Whether callers too find every model ready: the proxy and the ingress learn it a moment after the hub."""
    try:
        for model in file.args.models:
            urllib.request.urlopen(f"{url}/ready?model={urllib.parse.quote(model.name)}", timeout=2).close()
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """The line of Ray's report that an operator can act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error: " in line or "NotEnoughMemory: " in line:
            return line.split(": ", 1)[1]
    return lines[-1] if lines else repr(error)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """SIGTERM, and SIGINT: a shell that starts us in the background leaves that one ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _banner(url: str, file: ServeFile, cluster: Cluster) -> str:
    model = file.args.models[0].name
    stream: dict[str, object] = {"prompt": "The future of artificial intelligence is", "max_tokens": 40}
    chat: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    token = " (asks for the token in ~/.ray/auth_token)" if cluster.asks_for_token else ""
    dashboard = f"   Ray dashboard: http://{cluster.dashboard}{token}" if cluster.dashboard else ""
    return (
        f"\nserve_app answers on {url}   (Ctrl-C stops it)\n"
        f"Models: {', '.join(m.name for m in file.args.models)}{dashboard}\n"
        f"Playground, in a browser: {url}/\n"
        f"\nStream tokens:\n  {_curl(url + '/generate_stream', stream)}\n"
        f"\nChat:\n  {_curl(url + '/v1/chat/completions', chat)}\n"
    )


def _curl(url: str, body: dict[str, object]) -> str:
    return f"curl -N {url} -H 'content-type: application/json' -d '{json.dumps(body)}'"
