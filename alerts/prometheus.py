"""Configuration files for Prometheus: scrape targets, and the alert rules with the right links.

`python -m alerts prometheus` writes two configurations: one for a container next to a service on the same machine, and
one for Kubernetes. `python -m alerts monitor` writes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alerts import slo
from alerts.render import PACKAGE, render_template, write_file

CONFIG = "prometheus.yml"
RULES = "rules"
FOLDER = PACKAGE.parent / "cluster/monitoring/prometheus"

_HEADER = "Written by `python -m alerts prometheus` from alerts/prometheus.yml.jinja."


@dataclass(frozen=True)
class Targets:
    """The addresses that a Prometheus scrapes: `host:port`, as seen from Prometheus.

    `rules` is a glob pattern, `history_token` the path of a file with the bearer token of the alert history. Both may
    be relative to the folder of the configuration. `ray_file` is the path of Ray's service discovery file; None means
    discovery by Kubernetes. `loopback` replaces loopback addresses in that file, for a Prometheus that runs in a
    container. `service_key` is the path of a file with an API key of the
    service.
    """

    service: str
    prometheus: str
    alertmanager: str
    history: str | None
    history_token: str
    rules: str = f"{RULES}/*.yml"
    ray_file: str | None = None
    loopback: str | None = None
    scheme: str = "http"
    path: str = "/metrics"
    service_key: str | None = None
    header: str = _HEADER
    notes: tuple[str, ...] = ()


_SECRET = "secrets/history_token"
CONFIGS = {
    "prometheus.yml": Targets(
        service="host.docker.internal:8000",
        prometheus="localhost:9090",
        alertmanager="alertmanager:9093",
        history="host.docker.internal:9099",
        history_token=_SECRET,
        ray_file="/tmp/ray/prom_metrics_service_discovery.json",
        loopback="host.docker.internal",
        notes=(
            "For a container next to a service on the same machine, whose name is host.docker.internal. Mount /tmp/ray",
            "at the same path, because Ray's file there is a symbolic link. On Linux a container cannot reach a",
            "program that listens on loopback: use make serve ARGS='--host 0.0.0.0 --allow-anonymous', and",
            "ray start --head.",
            "Put rules/ and secrets/history_token next to this file. A service with keys needs one with the scope",
            "metrics: write it to a file, and authorization: {credentials_file: FILE} into its job.",
        ),
    ),
    "prometheus-kubernetes.yml": Targets(
        service="serve-app-serve-svc:8000",
        prometheus="localhost:9090",
        alertmanager="alertmanager:9093",
        history=None,
        history_token=_SECRET,
        notes=(
            "For a pod in the namespace of the RayService serve-app. It needs permission to list, get and watch pods.",
            "Put rules/ next to this file. A service with keys needs one with the scope metrics: write it to a file,",
            "and authorization: {credentials_file: FILE} into its job.",
        ),
    ),
}


def config(targets: Targets) -> str:
    return render_template(f"{CONFIG}.jinja", targets=targets)


def write(targets: Targets, folder: Path) -> Path:
    return write_file(folder / CONFIG, config(targets))


def write_configs(folder: Path) -> Iterator[Path]:
    for name, targets in CONFIGS.items():
        yield write_file(folder / name, config(targets))


def write_rules(folder: Path, runbooks: str, dashboards: str) -> Iterator[Path]:
    """Write the rules to `folder`/rules, with the two base addresses in their links."""
    for source in sorted((PACKAGE / RULES).glob("*.yml")):
        text = source.read_text(encoding="utf-8")
        yield write_file(folder / RULES / source.name, slo.linked(text, runbooks, dashboards))
