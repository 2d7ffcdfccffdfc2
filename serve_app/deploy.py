"""Deploys a configuration to a running Ray cluster, waits until it serves, and restores the previous one if it fails.

`python -m serve_app deploy`. Ray's own `serve deploy` ends before the rollout begins. If the new configuration cannot
run, it leaves the rollout where it stopped: the old replicas serve, but one that is lost later is not replaced.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import Any

from serve_app.config import ConfigError
from serve_app.progress import Progress
from serve_app.serve_file import load_deploy_file

_POLL_INTERVAL_S = 0.5
_FAILED = "DEPLOY_FAILED"
# A replica that was lost makes an application unhealthy until it is replaced. After this time something else is wrong.
_UNHEALTHY_S = 60.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Json = dict[str, Any]


class DeployError(Exception):
    """The configuration does not serve. The message has the reason."""


class ServeApi:
    """The REST interface of Ray Serve in the dashboard of a cluster."""

    def __init__(self, address: str) -> None:
        """Raises DeployError if no dashboard answers there."""
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        try:
            self._client = ServeSubmissionClient(address)
        except Exception as error:
            raise DeployError(f"no Ray dashboard answers at {address}: {_last_line(error)}") from error

    def applications(self) -> Json:
        """The state of each application, by name."""
        applications: Json = self._client.get_serve_details()["applications"]
        return applications

    def deploy(self, document: Json) -> None:
        """Make the document the goal of the cluster. Raises DeployError if Ray refuses it."""
        try:
            self._client.deploy_applications(document)
        except Exception as error:
            raise DeployError(f"Ray refused the configuration: {_last_line(error)}") from error


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if the new configuration serves, 1 if not, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    progress = Progress()
    try:
        document = load_deploy_file(arguments.config)
        api = ServeApi(arguments.address)
        _deploy_or_restore(api, document, arguments.timeout, progress)
    except (ConfigError, DeployError) as error:
        progress.end()
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.end()
        print("serve_app: the rollout continues; `serve status` shows its state", file=sys.stderr)
        return 130
    progress.end()
    print(f"{arguments.config} serves")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app deploy",
        description="Deploy the configuration file to a running Ray cluster and wait until every replica has it. If a "
        "replica cannot start, restore the previous configuration, print the reason, and end with status 1.",
    )
    parser.add_argument("--config", default="serve_config.yaml", help="Ray Serve config file (default: %(default)s)")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265"),
        help="address of the cluster's dashboard (default: RAY_DASHBOARD_ADDRESS, otherwise %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        help="seconds that a rollout may take; the start of GPU nodes is a part of it (default: %(default)s)",
    )
    return parser


def _deploy_or_restore(api: ServeApi, document: Json, timeout_s: float, progress: Progress) -> None:
    """Raises DeployError, after the previous configuration was restored, if there was one that served."""
    (name,) = (application.get("name", "default") for application in document["applications"])
    before = api.applications()
    try:
        _roll_out(api, document, name, timeout_s, progress)
    except DeployError as error:
        previous = [one["deployed_app_config"] for one in before.values() if one.get("deployed_app_config")]
        if name not in before or before[name]["status"] == _FAILED or not previous:
            raise DeployError(f"{error}\nThere is no previous configuration that served.") from error
        progress.show("restoring the previous configuration")
        _roll_out(api, {**document, "applications": previous}, name, timeout_s, progress)
        raise DeployError(f"{error}\nThe previous configuration was restored.") from error


def _roll_out(api: ServeApi, document: Json, name: str, timeout_s: float, progress: Progress) -> None:
    """Raises DeployError if the application does not run as the document says within the time."""
    api.deploy(document)
    healthy = time.monotonic()
    end = healthy + timeout_s
    while True:
        now = time.monotonic()
        try:
            application = api.applications()[name]
        except Exception as error:  # noqa: BLE001 - the dashboard or the controller may start again
            application = {"status": "UNKNOWN", "message": _last_line(error), "deployments": {}}
        if application["status"] == "RUNNING":
            return
        if application["status"] != "UNHEALTHY":
            healthy = now
        if application["status"] == _FAILED or now - healthy > _UNHEALTHY_S:
            raise DeployError(f"{name} cannot run:\n{_reasons(application)}")
        if now > end:
            raise DeployError(f"{name} does not run after {timeout_s:g} s:\n{_reasons(application)}")
        progress.show(f"{name}: {_state(application)}")
        time.sleep(_POLL_INTERVAL_S)


def _state(application: Json) -> str:
    """The deployments that do not run as the configuration says, with their states."""
    waiting = [f"{name} {one['status'].lower()}" for name, one in _unhealthy(application)]
    return ", ".join(waiting) or str(application["status"]).lower()


def _reasons(application: Json) -> str:
    """Why the application does not run: Ray's message, then the message of each deployment that does not run."""
    texts = [application["message"], *(one["message"] for _, one in _unhealthy(application))]
    return "\n".join(f"  {line}" for text in dict.fromkeys(texts) for line in _without_traceback(text))


def _without_traceback(text: str) -> list[str]:
    """The lines of a message of Ray; of a traceback in it, only the last line, which names the exception."""
    lines = [line.strip() for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    at = next((n for n, line in enumerate(lines) if line.startswith(("ray::", "Traceback"))), len(lines))
    return [*lines[:at], *lines[at:][-1:]]


def _unhealthy(application: Json) -> list[tuple[str, Json]]:
    return [(name, one) for name, one in application["deployments"].items() if one["status"] != "HEALTHY"]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1]
