"""Rendered files as data, each rendered once per test session, and Ray's validation of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from infra_pulumi import render, spec as descriptions
from infra_pulumi.catalogue import load
from infra_pulumi.spec import ClusterSpec, parse

Json: TypeAlias = Any
CLOUDS = ("aws", "gcp", "azure")
ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CONFIG = ROOT / "serve_config.yaml"
CATALOGUE = load()


def description(provider: str) -> ClusterSpec:
    """The repository's description for a cloud."""
    return descriptions.load(CLUSTER / f"descriptions/{provider}.yaml")


def changed(provider: str, **changes: Any) -> ClusterSpec:
    """The repository's description with other values; `pool` changes keys of its only pool."""
    document = yaml.safe_load((CLUSTER / f"descriptions/{provider}.yaml").read_text())
    pool = changes.pop("pool", {})
    return parse({**document, "gpu_pools": [{**document["gpu_pools"][0], **pool}], **changes})


@cache
def rendered(provider: str, folder: str = "rendered") -> dict[str, str]:
    """The files that `python -m infra_pulumi render --output FOLDER` writes, by path relative to the folder."""
    return render.files(description(provider), CATALOGUE, CONFIG, Path(folder))


def documents(provider: str, path: str) -> list[Json]:
    """The YAML documents of a rendered file. The caller may change them."""
    return list(yaml.load_all(rendered(provider)[path], yaml.CSafeLoader))


def service(provider: str) -> Json:
    """The rendered RayService."""
    (document,) = documents(provider, "kubernetes/rayservice.yaml")
    return document


def pod_monitors() -> list[Json]:
    """The PodMonitors of the service and of Ray."""
    return list(yaml.load_all((CLUSTER / "monitoring/podmonitor.yaml").read_text(), yaml.CSafeLoader))


def prometheus_rule() -> Json:
    """The PrometheusRule that `python -m alerts dashboards` writes."""
    from alerts.dashboards import write  # imports the Grafana SDK, which few tests need

    return yaml.load(write.files()["prometheusrule.yaml"], yaml.CSafeLoader)


def validate_with_ray(home: Path, **subjects: list[Json]) -> Json:
    """The results of tests/cluster/ray_validators.py, run with `home` as the home folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.ray_validators"],
        input=json.dumps(subjects),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
