"""What Prometheus reads: where it finds what it watches, and the rules with links that lead somewhere.

Two configurations are kept in the repository, `python -m alerts prometheus` writes them: for containers beside a
service on this machine, and for Kubernetes. `python -m alerts monitor` renders its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alerts import slo
from alerts.render import HERE, fill, replace

CONFIG = "prometheus.yml"
RULES = "rules"
KEPT = HERE.parent / "cluster/monitoring/prometheus"

_WRITTEN = "Written by `python -m alerts prometheus` from alerts/prometheus.yml.jinja."


@dataclass(frozen=True)
class Place:
    """Where a Prometheus finds its targets: each `host:port`, as it is reached from there.

    `rules` is a glob, `history_token` a file with the history receiver's bearer token; both may be relative to the
    configuration's folder. `ray_file` is Ray's service discovery file; None asks Kubernetes. `loopback` stands for
    loopback addresses in that file, where those are not Prometheus's own.
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
    made_by: str = _WRITTEN
    notes: tuple[str, ...] = ()


_SECRET = "secrets/history_token"
PLACES = {
    "prometheus.yml": Place(
        service="host.docker.internal:8000",
        prometheus="localhost:9090",
        alertmanager="alertmanager:9093",
        history="host.docker.internal:9099",
        history_token=_SECRET,
        ray_file="/tmp/ray/prom_metrics_service_discovery.json",
        loopback="host.docker.internal",
        notes=(
            "For a container beside a service on the machine itself, which it knows as host.docker.internal. Mount",
            "/tmp/ray at the same path: Ray's file there is a link. On Linux a container reaches only what does not",
            "listen on loopback: make serve ARGS='--host 0.0.0.0', and a Ray of `ray start --head` for its metrics.",
            "Beside this file: rules/ and secrets/history_token.",
        ),
    ),
    "prometheus-kubernetes.yml": Place(
        service="serve-app-serve-svc:8000",
        prometheus="localhost:9090",
        alertmanager="alertmanager:9093",
        history=None,
        history_token=_SECRET,
        notes=(
            "For a pod in the namespace of a RayService called serve-app; it may list, get and watch pods.",
            "Beside this file: rules/.",
        ),
    ),
}


def config(place: Place) -> str:
    return fill(f"{CONFIG}.jinja", place=place)


def write(place: Place, folder: Path) -> Path:
    return replace(folder / CONFIG, config(place))


def write_kept() -> Iterator[Path]:
    """Those in the repository."""
    for name, place in PLACES.items():
        yield replace(KEPT / name, config(place))


def write_rules(folder: Path, runbooks: str, dashboards: str) -> Iterator[Path]:
    """The rules into `folder`/rules. The two addresses take the place of those that the repository's rules have."""
    for source in sorted((HERE / RULES).glob("*.yml")):
        text = source.read_text(encoding="utf-8")
        yield replace(folder / RULES / source.name, slo.linked(text, runbooks, dashboards))
