"""Descriptions for tests, and their recordings, each evaluated once per test session."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra_pulumi.spec import ClusterSpec, parse

if TYPE_CHECKING:  # the tests of descriptions and prices do not need Pulumi
    from infra_pulumi.record import Recording

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
TYPES = {"aws": "g5.xlarge", "gcp": "g2-standard-4", "azure": "Standard_NC24ads_A100_v4"}


def document(provider: str = "aws", **changes: Any) -> dict[str, Any]:
    """A minimal description with other values; `pool` changes keys of its only pool."""
    pool = {"instance_types": [TYPES[provider]], **changes.pop("pool", {})}
    return {"provider": provider, "gpu_pools": [pool], **changes}


def full(provider: str) -> ClusterSpec:
    """A description that uses every section: two pools, three node groups, addons, a budget, production."""
    pools = [
        {"instance_types": [TYPES[provider]], "spot": True, "min": 1, "on_demand_base": 1},
        {"name": "more", "instance_types": [TYPES[provider]], "taints": [{"key": "team", "value": "a"}]},
    ]
    changes: dict[str, Any] = {
        "network": {"nat": "per-zone"},
        "production": True,
        "protect": True,
        "tags": {"team": "a"},
        "serve": {"config": CONFIG},
        "addons": {"by_pulumi": True},
    }
    budget = {"monthly_usd": 500, "emails": ["ops@host.org"]}
    return parse({"provider": provider, "gpu_pools": pools, "budget": budget, **changes})


@cache
def recorded(provider: str) -> Recording:
    """The recording of `full(provider)`. Tests share it and must not change it."""
    from infra_pulumi.plan import evaluate

    return evaluate(full(provider))


def planned(provider: str = "aws", **changes: Any) -> Recording:
    """The recording of `document(provider, **changes)`. Tests share it and must not change it."""
    return _planned(json.dumps(document(provider, **changes), sort_keys=True))


@cache
def _planned(text: str) -> Recording:
    from infra_pulumi.plan import evaluate

    return evaluate(parse(json.loads(text)))


def install_pulumi(folder: Path) -> Path:
    """Write a fake `pulumi` program into `folder` and return the file to which it appends its arguments."""
    calls = folder / "pulumi-calls"
    update = {"kind": "update", "result": "succeeded", "startTime": "2026-11-27T12:00:00.000Z", "version": 1}
    update |= {"endTime": "2026-11-27T12:00:00.000Z", "message": "", "environment": {}, "config": {}}
    program = folder / "pulumi"
    program.write_text(
        f"""#!/bin/sh
[ "$1" = version ] && echo v3.272.0 && exit
echo "$@" >> {calls}
case "$*" in
  *output*) echo '{json.dumps({"cluster_name": "serve-app"})}' ;;
  *history*) echo '{json.dumps([update])}' ;;
  *) echo '{{}}' ;;
esac
"""
    )
    program.chmod(0o755)
    calls.touch()
    return calls
