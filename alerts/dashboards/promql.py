"""The few shapes that the panels' questions have, and the numbers that they share with the rules.

Every ingress answers for the whole service: where several of its addresses are scraped, each replica counts once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alerts import slo

RULES = Path(slo.__file__).parent / "rules"
MODEL = 'model=~"$model"'
DEPLOYMENT = 'deployment=~"$deployment"'

# What a scrape adds: the same replica has these once an address.
_SCRAPED = "instance, pod, container"
# A comparison with a number other than 0, which says whether there is anything to judge.
_COMPARED = re.compile(r"[<>]=? *(0?\.?[1-9][\d.]*|0\.\d+)\b")

_LE = re.compile(r'le="([^"]*)"')


def once(series: str) -> str:
    return f"max without ({_SCRAPED}) ({series})"


def per_second(counter: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    return f"sum by ({', '.join(by)}) ({once(f'rate({counter}{{{where}}}[$__rate_interval])')})"


def total(gauge: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    return f"sum by ({', '.join(by)}) ({once(f'{gauge}{{{where}}}')})"


def highest(gauge: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    return f"max by ({', '.join(by)}) ({gauge}{{{where}}})"


def share(part: str, whole: str) -> str:
    """Of what there was; nothing while there was nothing."""
    return f"{part} / ({whole} > 0)"


def quantile(share: str, histogram: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    rate = f"rate({histogram}_bucket{{{where}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({', '.join(('le', *by))}) ({rate}))"


def quantiles(
    histogram: str, by: Sequence[str] = ("model",), where: str = MODEL, shares: Sequence[str] = ("0.5", "0.9", "0.99")
) -> tuple[tuple[str, str], ...]:
    """Questions and legends, such as `toy p99`."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple((quantile(one, histogram, by, where), f"{legend} p{float(one) * 100:g}") for one in shares)


def buckets(histogram: str, where: str = MODEL) -> tuple[tuple[str, str], ...]:
    """For a heatmap: what came into each bucket."""
    increase = f"increase({histogram}_bucket{{{where}}}[$__rate_interval])"
    return ((f"sum by (le) ({once(increase)})", "{{le}}"),)


def on_node(metric: str, where: str = "") -> str:
    """Of Ray's nodes. A link knows a node by its address, with a port or without; Ray has two names for the latter."""
    more = f", {where}" if where else ""
    address = "ip" if metric.startswith("ray_node_") else "NodeAddress"
    return f'({metric}{{instance=~"$node"{more}}} or {metric}{{{address}=~"$node"{more}}})'


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """All of them, by name."""
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def bound(alert: str) -> float:
    """The number that an alert compares with."""
    return float(_COMPARED.findall(alerts()[alert]["expr"])[0])


def bucket(alert: str) -> float:
    """The bucket's bound beyond which an alert counts."""
    return float(_LE.findall(alerts()[alert]["expr"])[0])


def objective(slug: str) -> float:
    """The bound of an objective about times, in seconds."""
    (found,) = (one for one in slo.SLOS if one.slug == slug)
    return float(_LE.findall(found.bad)[0])
