"""Prometheus, Alertmanager and the history of alerts beside a service on this machine, until Ctrl-C."""

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
from alerts.programs import Child, ProgramError, check, find, port
from alerts.settings import Settings, SettingsError, Timing, Webhook, load
from alerts.targets import State, look

_HOST = "127.0.0.1"
_LOOK_S = 1.0
_RAY_FILE = "prom_metrics_service_discovery.json"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Wanted:
    """What the command line says. A port of 0 is any that is free."""

    url: str
    data: Path
    settings: Path | None = None
    ray_metrics: Path | None = None
    prometheus_port: int = 9090
    alertmanager_port: int = 9093
    history_port: int = 9099


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first program starts. Addresses are `host:port`."""

    programs: dict[str, str]
    folder: Path
    prometheus: str
    alertmanager: str
    history: str
    external_url: str
    token: Path
    lock: IO[str]  # held as long as it is open

    def commands(self) -> Iterator[tuple[str, list[str], str]]:
        """In the order in which they start: name, command, and where it answers once it is ready."""
        history = [sys.executable, "-m", "alerts", "history", "--port", self.history.rpartition(":")[2]]
        history += [f"--database={self.folder / 'alerts.sqlite'}", f"--token-file={self.token}"]
        yield "history", history, f"http://{self.history}/healthy"
        alertmanager = render.start_command(
            self.programs["Alertmanager"], self.folder, self.external_url, "alertmanager", self.alertmanager
        )
        # The settings' address may have a path, where a proxy in front has it; here is none.
        yield "alertmanager", [*alertmanager, "--web.route-prefix=/"], f"http://{self.alertmanager}/-/ready"
        command = [
            self.programs["Prometheus"],
            f"--config.file={self.folder / prometheus.CONFIG}",
            f"--storage.tsdb.path={self.folder / 'prometheus'}",
            f"--web.listen-address={self.prometheus}",
            f"--web.external-url=http://{self.prometheus}/",
            "--storage.tsdb.retention.time=35d",  # error budgets look back 30 days
            "--rules.alert.resend-delay=15s",
        ]
        yield "prometheus", command, f"http://{self.prometheus}/-/ready"


def run(wanted: Wanted) -> None:
    """Until Ctrl-C or SIGTERM. Raises SettingsError, ProgramError, OSError."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    children: list[Child] = []
    try:
        plan = _plan(wanted)
        for name, command, url in plan.commands():
            child = Child(name, command, plan.folder / f"{name}.log")
            children.append(child)
            child.ready(url)
        print(_banner(wanted, plan), flush=True)
        _watch(wanted, plan, children)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave programs behind
        for child in reversed(children):
            child.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _plan(wanted: Wanted) -> Plan:
    """Find the programs, take the ports, write the files and have them checked."""
    place = _service(wanted.url)
    settings = None if wanted.settings is None else _usable(wanted.settings)
    programs = find("Prometheus", "promtool", "Alertmanager", "amtool")
    prometheus_at, alertmanager_at, history_at = _addresses(wanted)
    folder = wanted.data.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    token = folder / "history_token"
    if settings is not None and settings.history is not None:
        token = settings.history.token_file
    else:
        _write_secret(token)
    external = f"http://{alertmanager_at}" if settings is None else settings.external_url
    plan = Plan(programs, folder, prometheus_at, alertmanager_at, history_at, external, token, lock)
    _write(wanted, plan, settings, place)
    check([programs["promtool"], "check", "config", str(folder / prometheus.CONFIG)])
    check([programs["amtool"], "check-config", str(folder / render.CONFIG)])
    return plan


def _addresses(wanted: Wanted) -> tuple[str, str, str]:
    """Prometheus', Alertmanager's, the history's. Raises ProgramError."""
    ports = (
        port(wanted.prometheus_port, "--prometheus-port", "Prometheus"),
        port(wanted.alertmanager_port, "--alertmanager-port", "Alertmanager"),
        port(wanted.history_port, "--history-port", "the history of alerts"),
    )
    if len(set(ports)) < len(ports):
        raise ProgramError(f"each of the three needs a port of its own, not {ports}")
    first, second, third = (f"{_HOST}:{number}" for number in ports)
    return first, second, third


def _lock(folder: Path) -> IO[str]:
    """Or a second one would write its configuration under the first one's programs."""
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ProgramError(f"another monitor works in {folder}; stop it, or give another --data") from None
    return lock


def _service(url: str) -> tuple[str, str, str]:
    """Scheme, host:port and the path of the service's metrics. Raises ProgramError."""
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # of .port
        if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username:
            address = parts.netloc if parts.port else f"{parts.netloc}:{443 if parts.scheme == 'https' else 80}"
            return parts.scheme, address, f"{parts.path.rstrip('/')}/metrics"
    raise ProgramError(f"--url {url!r} is no address of a service; write it like http://127.0.0.1:8000")


def _usable(path: Path) -> Settings:
    settings = load(path)
    obstacles = render.obstacles(settings)
    if obstacles:
        listed = "\n".join(f"  {line}" for line in obstacles)
        raise SettingsError(f"{path} would reach nobody; without --settings alerts are only kept here:\n{listed}")
    return settings


def _write_secret(path: Path) -> None:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(16) + "\n")


def _write(wanted: Wanted, plan: Plan, settings: Settings | None, service: tuple[str, str, str]) -> None:
    scheme, address, path = service
    place = prometheus.Place(
        service=address,
        prometheus=plan.prometheus,
        alertmanager=plan.alertmanager,
        history=plan.history,
        history_token=str(plan.token),
        ray_file=str(_ray_file(wanted)),
        scheme=scheme,
        path=path,
        made_by="Written by `python -m alerts monitor`, anew at every start.",
    )
    prometheus.write(place, plan.folder)
    webhook = Webhook(url=f"http://{plan.history}/webhook", token_file=plan.token)
    if settings is None:
        links = ((render.HERE / "runbooks").as_uri(), slo.DASHBOARDS)
        render.replace(plan.folder / render.CONFIG, _local_routes(webhook))
    else:
        links = (settings.runbooks_url, settings.dashboards_url)
        render.write(settings.model_copy(update={"history": webhook}), plan.folder)
    list(prometheus.write_rules(plan.folder, *links))


def _local_routes(history: Webhook) -> str:
    """Alertmanager's configuration that tells the history receiver alone."""
    times = Timing().history.model_dump()
    told = {
        "url": history.url,
        "send_resolved": True,
        "http_config": {"authorization": {"credentials_file": str(history.token_file)}},
    }
    nobody = {"receiver": "nobody", "matchers": ['severity="none"']}
    route = {"receiver": "history", "group_by": ["alertname", "model"], **times, "routes": [nobody]}
    receivers = [{"name": "history", "webhook_configs": [told]}, {"name": "nobody"}]
    return yaml.safe_dump({"route": route, "receivers": receivers}, sort_keys=False)


def _ray_file(wanted: Wanted) -> Path:
    """Where the Ray that is (or will be) started on this machine lists its metrics: in its folder of temporary files,
    which it finds as here. It need not be there yet; Prometheus looks again and again."""
    if wanted.ray_metrics is not None:
        return wanted.ray_metrics.absolute()
    temporary = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR"))
    if not temporary:
        temporary = "/tmp" if sys.platform in ("darwin", "linux") else tempfile.gettempdir()
    return Path(temporary) / "ray" / _RAY_FILE


def _banner(wanted: Wanted, plan: Plan) -> str:
    told = (
        "Alerts are only kept here, nobody is told; --settings FILE tells people (python -m alerts --help)"
        if wanted.settings is None
        else f"Alerts are told to whom {wanted.settings} names, and kept here"
    )
    return (
        f"\nmonitoring {wanted.url}   (Ctrl-C stops it; files and logs are in {plan.folder})\n"
        f"  Prometheus     http://{plan.prometheus}/graph\n"
        f"  Alerts         http://{plan.prometheus}/alerts\n"
        f"  Targets        http://{plan.prometheus}/targets\n"
        f"  Alertmanager   http://{plan.alertmanager}/\n"
        f'  History        curl -H "Authorization: Bearer $(cat {plan.token})" http://{plan.history}/alerts\n'
        f"{told}.\n"
    )


def _watch(wanted: Wanted, plan: Plan, children: list[Child]) -> None:
    """Say when what is watched comes and goes. Raises Ended when one of ours does."""
    known: dict[str, State] = {}
    while True:
        for child in children:
            child.ended()
        for job, (state, text) in look(plan.prometheus, _ray_file(wanted)).items():
            if known.get(job) != state:
                print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
            known[job] = state
        time.sleep(_LOOK_S)
