"""Runs Prometheus, Alertmanager and the alert history next to a service on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO
from urllib.parse import urlsplit

import yaml

from alerts import prometheus, render, slo
from alerts.programs import Child, ProgramError, available_port, check, find
from alerts.settings import Settings, SettingsError, Timing, Webhook, load
from alerts.targets import State, states

_HOST = "127.0.0.1"
_POLL_S = 1.0
_RAY_FILE = "prom_metrics_service_discovery.json"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """The command line options of `python -m alerts monitor`. A port of 0 means any free port."""

    url: str
    data: Path
    settings: Path | None
    ray_metrics: Path | None
    prometheus_port: int
    alertmanager_port: int
    history_port: int
    key_file: Path | None = None


@dataclass(frozen=True)
class Plan:
    """All decisions that are made before the first program starts. Addresses are `host:port`."""

    programs: dict[str, str]
    folder: Path
    prometheus: str
    alertmanager: str
    history: str
    external_url: str
    token: Path
    lock: IO[str]  # the lock is held while this file is open

    def commands(self) -> Iterator[tuple[str, list[str], str]]:
        """Name, command and readiness URL of each program, in the order in which they start."""
        history = [sys.executable, "-m", "alerts", "history", "--port", self.history.rpartition(":")[2]]
        history += [f"--database={self.folder / 'alerts.sqlite'}", f"--token-file={self.token}"]
        yield "history", history, f"http://{self.history}/healthy"
        alertmanager = render.start_command(
            self.programs["Alertmanager"], self.folder, self.external_url, "alertmanager", self.alertmanager
        )
        # external_url may have a path that a proxy adds. There is no proxy here, so the prefix is set explicitly.
        yield "alertmanager", [*alertmanager, "--web.route-prefix=/"], f"http://{self.alertmanager}/-/ready"
        command = [
            self.programs["Prometheus"],
            f"--config.file={self.folder / prometheus.CONFIG}",
            f"--storage.tsdb.path={self.folder / 'prometheus'}",
            f"--web.listen-address={self.prometheus}",
            f"--web.external-url=http://{self.prometheus}/",
            "--storage.tsdb.retention.time=35d",  # the error budgets cover 30 days
            "--rules.alert.resend-delay=15s",
        ]
        yield "prometheus", command, f"http://{self.prometheus}/-/ready"


def run(options: Options) -> None:
    """Run until Ctrl-C or SIGTERM. Raises SettingsError, ProgramError, OSError."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    children: list[Child] = []
    try:
        plan = _prepare(options)
        for name, command, url in plan.commands():
            child = Child(name, command, plan.folder / f"{name}.log")
            children.append(child)
            child.wait_until_ready(url)
        print(_banner(options, plan), flush=True)
        _watch(options, plan, children)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stopping of the children
        for child in reversed(children):
            child.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _prepare(options: Options) -> Plan:
    """Find the programs, choose the ports, and write and check the configuration files."""
    service = _service(options.url)
    settings = None if options.settings is None else _complete_settings(options.settings)
    programs = find("Prometheus", "promtool", "Alertmanager", "amtool")
    prometheus_at, alertmanager_at, history_at = _addresses(options)
    folder = options.data.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    token = folder / "history_token"
    if settings is not None and settings.history is not None:
        token = settings.history.token_file
    else:
        _write_secret(token)
    external = f"http://{alertmanager_at}" if settings is None else settings.external_url
    plan = Plan(programs, folder, prometheus_at, alertmanager_at, history_at, external, token, lock)
    _write(options, plan, settings, service)
    check([programs["promtool"], "check", "config", str(folder / prometheus.CONFIG)])
    check([programs["amtool"], "check-config", str(folder / render.CONFIG)])
    return plan


def _addresses(options: Options) -> tuple[str, str, str]:
    """Addresses of Prometheus, Alertmanager and the alert history. Raises ProgramError."""
    ports = (
        available_port(options.prometheus_port, "--prometheus-port", "Prometheus"),
        available_port(options.alertmanager_port, "--alertmanager-port", "Alertmanager"),
        available_port(options.history_port, "--history-port", "the alert history"),
    )
    if len(set(ports)) < len(ports):
        raise ProgramError(f"the three ports must be different, but are {ports}")
    first, second, third = (f"{_HOST}:{number}" for number in ports)
    return first, second, third


def _lock(folder: Path) -> IO[str]:
    """Lock the folder, so that a second monitor cannot overwrite its configuration files. Raises ProgramError."""
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ProgramError(f"another monitor uses {folder}. Stop it, or give another folder with --data") from None
    return lock


def _service(url: str) -> tuple[str, str, str]:
    """Scheme, host:port and metrics path of the service. Raises ProgramError."""
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # .port raises it
        if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username:
            address = parts.netloc if parts.port else f"{parts.netloc}:{443 if parts.scheme == 'https' else 80}"
            return parts.scheme, address, f"{parts.path.rstrip('/')}/metrics"
    raise ProgramError(f"--url {url!r} is not the address of a service; an example is http://127.0.0.1:8000")


def _complete_settings(path: Path) -> Settings:
    """Raises SettingsError if values or secrets are missing."""
    settings = load(path)
    problems = render.problems(settings)
    if problems:
        listed = "\n".join(f"  {line}" for line in problems)
        raise SettingsError(
            f"{path} is incomplete, so no notification would be delivered. Without --settings, alerts are only "
            f"recorded here.\n{listed}"
        )
    return settings


def _write_secret(path: Path) -> None:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(16) + "\n")


def _write(options: Options, plan: Plan, settings: Settings | None, service: tuple[str, str, str]) -> None:
    scheme, address, path = service
    targets = prometheus.Targets(
        service=address,
        prometheus=plan.prometheus,
        alertmanager=plan.alertmanager,
        history=plan.history,
        history_token=str(plan.token),
        ray_file=str(ray_file(options.ray_metrics)),
        scheme=scheme,
        path=path,
        header="Written by `python -m alerts monitor` at every start.",
        service_key=None if options.key_file is None else str(options.key_file.absolute()),
    )
    prometheus.write(targets, plan.folder)
    webhook = Webhook(url=f"http://{plan.history}/webhook", token_file=plan.token)
    if settings is None:
        links = ((render.PACKAGE / "runbooks").as_uri(), slo.DASHBOARDS_URL)
        render.write_file(plan.folder / render.CONFIG, _history_only_config(webhook))
    else:
        links = (settings.runbooks_url, settings.dashboards_url)
        render.write(settings.model_copy(update={"history": webhook}), plan.folder)
    list(prometheus.write_rules(plan.folder, *links))


def _history_only_config(history: Webhook) -> str:
    """An Alertmanager configuration whose only receiver is the alert history."""
    timing = Timing().history.model_dump()
    webhook = {
        "url": history.url,
        "send_resolved": True,
        "http_config": {"authorization": {"credentials_file": str(history.token_file)}},
    }
    watchdog = {"receiver": "none", "matchers": ['severity="none"']}
    route = {"receiver": "history", "group_by": ["alertname", "model"], **timing, "routes": [watchdog]}
    receivers = [{"name": "history", "webhook_configs": [webhook]}, {"name": "none"}]
    return yaml.safe_dump({"route": route, "receivers": receivers}, sort_keys=False)


def ray_file(configured: Path | None) -> Path:
    """The file in which Ray lists its metrics addresses. It is in Ray's temporary folder, which is determined here in
    the same way as in Ray. The file does not have to exist yet, because Prometheus reads it repeatedly."""
    if configured is not None:
        return configured.absolute()
    temporary = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR"))
    if not temporary:
        temporary = "/tmp" if sys.platform in ("darwin", "linux") else tempfile.gettempdir()
    return Path(temporary) / "ray" / _RAY_FILE


def _banner(options: Options, plan: Plan) -> str:
    receivers = (
        "Alerts are only recorded here. To send notifications, use --settings FILE (see python -m alerts --help)"
        if options.settings is None
        else f"Alerts are sent to the receivers in {options.settings} and recorded here"
    )
    return (
        f"\nmonitoring {options.url}   (Ctrl-C stops it; files and logs are in {plan.folder})\n"
        f"  Prometheus     http://{plan.prometheus}/graph\n"
        f"  Alerts         http://{plan.prometheus}/alerts\n"
        f"  Targets        http://{plan.prometheus}/targets\n"
        f"  Alertmanager   http://{plan.alertmanager}/\n"
        f'  History        curl -H "Authorization: Bearer $(cat {plan.token})" http://{plan.history}/alerts\n'
        f"{receivers}.\n"
    )


def _watch(options: Options, plan: Plan, children: list[Child]) -> None:
    """Print each change of state of the service and of Ray. Raises ProgramEnded when a child ends."""
    known: dict[str, State] = {}
    while True:
        for child in children:
            child.raise_if_ended()
        for job, (state, text) in states(plan.prometheus, ray_file(options.ray_metrics)).items():
            if known.get(job) != state:
                print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
            known[job] = state
        time.sleep(_POLL_S)
