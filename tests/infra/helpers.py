"""Descriptions and recordings that the tests of this room share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra_pulumi.spec import ClusterSpec, parse

if TYPE_CHECKING:  # it needs Pulumi, which the tests of descriptions and prices do not
    from infra_pulumi.record import Recording

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
TYPES = {"aws": "g5.xlarge", "gcp": "g2-standard-4", "azure": "Standard_NC24ads_A100_v4"}


def document(provider: str = "aws", **changes: Any) -> dict[str, Any]:
    pool = {"instance_types": [TYPES[provider]], **changes.pop("pool", {})}
    return {"provider": provider, "gpu_pools": [pool], **changes}


def full(provider: str) -> ClusterSpec:
    """Of everything something: two node groups in one pool, a second pool, addons, a budget, production."""
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
    from infra_pulumi.plan import evaluate

    return evaluate(full(provider))
