"""Functions that build the PromQL of the panels, and the thresholds that panels share with the rules.

Every ingress replica reports the whole service. If Prometheus scrapes several addresses, the queries count each replica
once.
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

# Labels that a scrape adds. The series of one replica differ in them if several addresses are scraped.
_SCRAPED = "instance, pod, container"
# A comparison with a number other than 0. Comparisons with 0 check whether there is any traffic.
_COMPARED = re.compile(r"[<>]=? *(0?\.?[1-9][\d.]*|0\.\d+)\b")

_LE = re.compile(r'le="([^"]*)"')


def deduplicated(series: str) -> str:
    return f"max without ({_SCRAPED}) ({series})"


def per_second(counter: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    return f"sum by ({', '.join(by)}) ({deduplicated(f'rate({counter}{{{where}}}[$__rate_interval])')})"


def total(gauge: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    return f"sum by ({', '.join(by)}) ({deduplicated(f'{gauge}{{{where}}}')})"


def maximum(gauge: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    return f"max by ({', '.join(by)}) ({gauge}{{{where}}})"


def ratio(part: str, total: str) -> str:
    """PromQL of part / total, without a value while the total is 0."""
    return f"{part} / ({total} > 0)"


def quantile(q: str, histogram: str, by: Sequence[str] = ("model",), where: str = MODEL) -> str:
    rate = f"rate({histogram}_bucket{{{where}}}[$__rate_interval])"
    return f"histogram_quantile({q}, sum by ({', '.join(('le', *by))}) ({rate}))"


def quantiles(
    histogram: str,
    by: Sequence[str] = ("model",),
    where: str = MODEL,
    levels: Sequence[str] = ("0.5", "0.9", "0.99"),
) -> tuple[tuple[str, str], ...]:
    """Pairs of PromQL and legend, for example `toy p99`."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple((quantile(one, histogram, by, where), f"{legend} p{float(one) * 100:g}") for one in levels)


def buckets(histogram: str, where: str = MODEL) -> tuple[tuple[str, str], ...]:
    """PromQL for a heatmap: new observations in each bucket."""
    increase = f"increase({histogram}_bucket{{{where}}}[$__rate_interval])"
    return ((f"sum by (le) ({deduplicated(increase)})", "{{le}}"),)


def on_node(metric: str, where: str = "") -> str:
    """PromQL of a metric of Ray's nodes for the variable `node`, which is an address with or without a port. The label
    of the address without a port has two names."""
    more = f", {where}" if where else ""
    address = "ip" if metric.startswith("ray_node_") else "NodeAddress"
    return f'({metric}{{instance=~"$node"{more}}} or {metric}{{{address}=~"$node"{more}}})'


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """All alert rules by name."""
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def threshold(alert: str) -> float:
    """The number that an alert compares with."""
    return float(_COMPARED.findall(alerts()[alert]["expr"])[0])


def bucket(alert: str) -> float:
    """The bucket bound that an alert uses as its threshold."""
    return float(_LE.findall(alerts()[alert]["expr"])[0])


def objective(slug: str) -> float:
    """The bound of a latency objective in seconds."""
    (found,) = (one for one in slo.SLOS if one.slug == slug)
    return float(_LE.findall(found.bad)[0])
