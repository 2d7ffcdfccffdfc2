"""Runs the service on this machine until Ctrl-C.

Starts a local Ray if none is reachable, deploys the configuration, shows the state of the models until they can serve,
and stops at its end everything that it started.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import FrameType

from serve_app.config import AuthOptions, ConfigError
from serve_app.deployments import haproxy
from serve_app.deployments.cluster import Cluster, ClusterError, connect
from serve_app.deployments.haproxy import TLS_CERTIFICATE
from serve_app.progress import Progress
from serve_app.readiness import waiting_models
from serve_app.serve_file import ServeFile, load_serve_file

_POLL_INTERVAL_S = 0.2
# The modules of other commands, which are imported when they run: the database takes 0.2 s to import.
_COMMANDS = {
    "batch": "serve_app.batch_cli",
    "deploy": "serve_app.deploy",
    "experiments": "serve_app.experiment_cli",
    "keys": "serve_app.keys_cli",
    "tenants": "serve_app.tenants_cli",
    "usage": "serve_app.usage_cli",
}


class StartError(Exception):
    """The service cannot start. The message gives the reason and what to do."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of the proxy."""

    host: str
    port: int

    def check(self) -> None:
        """Raises StartError if the address cannot be bound. Ray's own error would not give the reason."""
        _check_certificate(os.environ.get(TLS_CERTIFICATE))
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise StartError(f"cannot listen on {self.host}:{self.port}: {error}; choose another with --port") from None

    def url(self, route_prefix: str) -> str:
        """The service's URL for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if os.environ.get(TLS_CERTIFICATE) else "http"
        return f"{scheme}://{host}:{self.port}{route_prefix.rstrip('/')}"


# Set by the signal handler: other code may swallow its KeyboardInterrupt, or raise another exception because of it.
_interrupted = threading.Event()


def main(argv: list[str] | None = None) -> int:
    """Run the service, or another command.

    Returns the exit code: 0 after Ctrl-C, 130 after Ctrl-C during the start, 1 after an error.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in _COMMANDS:
        code: int = import_module(_COMMANDS[words[0]]).main(words[1:])
        return code
    arguments = _parser().parse_args(words)
    _on_signals(_interrupt)
    progress = Progress()
    try:
        file = load_serve_file(arguments.config)
        address = Address(arguments.host or file.http_options.host, arguments.port or file.http_options.port)
        if arguments.allow_anonymous:
            file = _with_everyone(file)
        file.application.args.check_address(address.host)
        address.check()
        return _serve(arguments.ray_address, arguments.dashboard, address, file, progress)
    except KeyboardInterrupt:
        progress.end()
        return 130
    except Exception as error:
        progress.end()
        if _interrupted.is_set():
            return 130
        if not isinstance(error, ConfigError | ClusterError | StartError):
            raise
        print(f"serve_app: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app",
        description="Run the LLM service on this machine. The command starts Ray, unless a Ray cluster is reachable, "
        "and deploys the configuration file to it. Ctrl-C stops the service and everything that the command started.",
        epilog="Other commands: `python -m serve_app deploy --help` (deploy the file to a cluster that goes on running "
        "and restore the previous configuration if the new one cannot run), `python -m serve_app experiments --help` "
        "(compare the variants of experiments, check their configuration), `python -m serve_app batch --help` (run "
        "many requests at low priority), `python -m serve_app keys --help`, `python -m serve_app tenants --help` and "
        "`python -m serve_app usage --help` (API keys, the limits of their owners, and what they have used).",
    )
    parser.add_argument("--config", default="serve_config.yaml", help="Ray Serve config file (default: %(default)s)")
    parser.add_argument("--host", help="address to listen on (default: the file's http_options.host)")
    parser.add_argument("--port", type=_port, help="port to listen on (default: the file's http_options.port)")
    parser.add_argument(
        "--allow-anonymous",
        action="store_true",
        help="let everyone who reaches the port use the service without an API key, on any address",
    )
    parser.add_argument(
        "--ray-address",
        default="auto",
        help="auto: the reachable Ray cluster, otherwise a new local Ray; local: a new local Ray; "
        "or the address of a Ray cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--no-dashboard",
        action="store_false",
        dest="dashboard",
        help="start Ray without its dashboard, which takes seconds at the start and 200 MB of memory",
    )
    return parser


def _check_certificate(path: str | None) -> None:
    """Raises StartError if the file of TLS_CERTIFICATE cannot be used, or if no HAProxy is there to use it."""
    if not path:
        return
    if haproxy.find() is None or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0":
        raise StartError(f"{TLS_CERTIFICATE} needs HAProxy, which Ray Serve does not have or does not use here")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(path)
    except OSError as error:
        raise StartError(
            f"{TLS_CERTIFICATE}: {path} is no PEM file with a certificate and its private key: {error}"
        ) from None


def _with_everyone(file: ServeFile) -> ServeFile:
    """The file with `auth: {allow_anonymous: true}`. Raises StartError if it demands keys."""
    application = file.application
    if application.args.checks_keys:
        raise StartError(
            "--allow-anonymous contradicts `auth` of the file, which demands API keys; leave one of them out"
        )
    args = application.args.model_copy(update={"auth": AuthOptions(allow_anonymous=True)})
    return file.model_copy(update={"applications": (application.model_copy(update={"args": args}),)})


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use a number from 1 to 65535")
    return int(text)


def _serve(ray_address: str, dashboard: bool, address: Address, file: ServeFile, progress: Progress) -> int:
    progress.show("starting Ray")
    cluster = _connect(ray_address, file.application.args.limits.request_timeout_s, dashboard)
    try:
        progress.show("starting Ray Serve")
        _deploy(address, file, progress)
        print(_banner(address.url(file.application.route_prefix), file, cluster), flush=True)
        threading.Event().wait()
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C would interrupt the clean-up and leave processes behind.
        _on_signals(signal.SIG_IGN)
        progress.show("stopping")
        cluster.stop(file.application.name)
        progress.show("stopped")
        progress.end()


def _connect(address: str, longest_s: float, dashboard: bool) -> Cluster:
    """Join or start Ray. Signals are handled after that: a Ray that has started in part cannot be stopped."""
    signals: list[int] = []
    _on_signals(lambda number, _: signals.append(number))
    try:
        cluster = connect(address, longest_s, dashboard)
    finally:
        _on_signals(_interrupt)  # Ray has installed its own handler
    if signals:
        cluster.stop("")
        raise KeyboardInterrupt
    return cluster


def _deploy(address: Address, file: ServeFile, progress: Progress) -> None:
    """Deploy, and show the state of the models until they can serve. Raises StartError if the deployment fails."""
    from ray import serve

    from serve_app.app import build_with

    for name in ("ray.serve", "ray.serve._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    application = file.application
    options = file.http_options.model_dump(exclude_none=True) | {"host": address.host, "port": address.port}
    failure: list[Exception] = []

    def run() -> None:
        try:
            graph = build_with(application.args, application.user_config)
            serve.run(graph, name=application.name, route_prefix=application.route_prefix)
        except Exception as error:  # noqa: BLE001 - reported to the operator
            failure.append(error)

    try:
        serve.start(http_options=options)
    except Exception as error:
        raise StartError(f"Ray Serve did not start: {_reason(error)}") from error
    deployment = threading.Thread(target=run, daemon=True)
    deployment.start()
    url = address.url(application.route_prefix)
    models = [model.name for model in application.args.models]
    waiting: list[str] | None = None
    while deployment.is_alive() or waiting is None or waiting:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        time.sleep(_POLL_INTERVAL_S)
        failed = bool(failure)
        waiting = waiting_models(url, models)
        if failed:
            raise StartError(f"the deployment failed: {'; '.join(waiting or []) or _reason(failure[0])}")
        progress.show("starting the application" if waiting is None else "; ".join(waiting) or "ready")
    progress.end()


def _reason(error: Exception) -> str:
    """The line of a Ray exception that gives the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error: " in line or "NotEnoughMemory: " in line:
            return line.split(": ", 1)[1]
    return lines[-1] if lines else repr(error)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Handle SIGTERM, and SIGINT even if a shell that starts programs in the background has set it to be ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _banner(url: str, file: ServeFile, cluster: Cluster) -> str:
    models = [model.name for model in file.application.args.models]
    stream: dict[str, object] = {"prompt": "The future of artificial intelligence is", "max_tokens": 40}
    chat: dict[str, object] = {
        "model": models[0],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    token = " (needs the token in ~/.ray/auth_token)" if cluster.asks_for_token else ""
    dashboard = f"   Ray dashboard: http://{cluster.dashboard}{token}" if cluster.dashboard else ""
    checks_keys = file.application.args.checks_keys
    key = "API keys: `python -m serve_app keys create`; the commands below take one from SERVE_APP_API_KEY\n"
    return (
        f"\nserve_app answers on {url}   (Ctrl-C stops it)\n"
        f"Models: {', '.join(models)}{dashboard}\n"
        f"Playground, in a browser: {url}/\n"
        f"{key if checks_keys else ''}"
        f"\nStream tokens:\n  {_curl(url + '/generate_stream', stream, checks_keys)}\n"
        f"\nChat:\n  {_curl(url + '/v1/chat/completions', chat, checks_keys)}\n"
    )


def _curl(url: str, body: dict[str, object], with_key: bool) -> str:
    key = ' -H "x-api-key: $SERVE_APP_API_KEY"' if with_key else ""
    return f"curl -N {url} -H 'content-type: application/json'{key} -d '{json.dumps(body)}'"
