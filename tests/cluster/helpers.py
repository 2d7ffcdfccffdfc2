"""The kept files as data, and Ray's opinion of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from infra_pulumi import spec as descriptions
from infra_pulumi.catalogue import load
from infra_pulumi.render import KEPT, ROOT
from infra_pulumi.spec import ClusterSpec, parse

Json: TypeAlias = Any
CLOUDS = ("aws", "gcp", "azure")
CONFIG = ROOT / "serve_config.yaml"
KNOWN = load()


def description(provider: str) -> ClusterSpec:
    return descriptions.load(KEPT / f"descriptions/{provider}.yaml")


def changed(provider: str, **changes: Any) -> ClusterSpec:
    """The kept description with other values of its own keys; `pool` changes its only pool."""
    document = yaml.safe_load((KEPT / f"descriptions/{provider}.yaml").read_text())
    pool = changes.pop("pool", {})
    return parse({**document, "gpu_pools": [{**document["gpu_pools"][0], **pool}], **changes})


def kept(path: str) -> list[Json]:
    return list(yaml.safe_load_all((KEPT / path).read_text()))


def ask_ray(home: Path, **subjects: list[Json]) -> Json:
    """What tests/cluster/judge.py says, with `home` as the home folder."""
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
