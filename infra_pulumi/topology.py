"""Draws a cluster as SVG: connections, private and public parts, autoscaled nodes; light and dark colours."""

from __future__ import annotations

from html import escape

from infra_pulumi import pod_resources
from infra_pulumi.catalogue import Catalogue
from infra_pulumi.spec import ClusterSpec

WIDTH = 960
_LINE = 18

_PRODUCT_NAMES = {
    "aws": {"cluster": "EKS", "network": "VPC", "registry": "ECR", "keys": "KMS"},
    "gcp": {"cluster": "GKE", "network": "VPC", "registry": "Artifact Registry", "keys": "Google-managed keys"},
    "azure": {
        "cluster": "AKS",
        "network": "virtual network",
        "registry": "Container Registry",
        "keys": "Azure-managed keys",
    },
}

_STYLE = """
  svg { --ground: #fff; --text: #1a2129; --soft: #57626e; --line: #8a95a1; --box: #f4f6f8; --system: #e3ecf9;
        --gpu: #e2f3e6; --mark: #1f5fb8; background: var(--ground); font: 14px system-ui, sans-serif }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #14181d; --text: #e8edf2; --soft: #a5b0bb; --line: #6b7682; --box: #1c2229; --system: #1d2c42;
          --gpu: #1c3524; --mark: #7fb2ff }
  }
  text { fill: var(--text) } .soft { fill: var(--soft); font-size: 13px } .title { font-weight: 600 }
  .name { font-weight: 600; font-size: 18px }
  rect { fill: var(--box); stroke: var(--line) } .system { fill: var(--system) } .gpu { fill: var(--gpu) }
  .autoscaled { stroke-dasharray: 6 4 } path { stroke: var(--mark); stroke-width: 1.5; fill: none }
  marker path { fill: var(--mark); stroke: none }
"""


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, lines: list[str], kind: str = "") -> list[str]:
    """A box with a title and further lines of text."""
    title, *rest = lines
    attribute = f' class="{kind}"' if kind else ""
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"{attribute}/>',
        _text(x + 14, y + 24, title, "title"),
        *(_text(x + 14, y + 26 + _LINE * number, line, "soft") for number, line in enumerate(rest, start=1)),
    ]


def _arrow(*points: tuple[float, float], both: bool = False) -> str:
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    start = ' marker-start="url(#tip)"' if both else ""
    return f'<path d="M {path}" marker-end="url(#tip)"{start}/>'


def _pool_lines(spec: ClusterSpec, catalogue: Catalogue, index: int) -> list[str]:
    pool, machines = spec.gpu_pools[index], pod_resources.machines(spec, catalogue, index)
    size = pod_resources.pod_size(spec, catalogue, index)
    capacity = f"spot, {pool.on_demand_base} on demand" if pool.on_demand_base else "spot" if pool.spot else "on demand"
    others = f" or {len(machines) - 1} more" if len(machines) > 1 else ""
    return [
        f"GPU pool {pool.name}: {pool.min} to {pool.max} nodes",
        f"{machines[0].type}{others}",
        f"{size.gpus} x {machines[0].gpu}, {capacity}",
        f"one Ray worker per node: {size.cpus} CPU, {size.memory_gib} GiB",
        "HAProxy, ingress and model replicas",
    ]


def svg(spec: ClusterSpec, catalogue: Catalogue) -> str:
    """The SVG of a description's cluster; the same description gives the same bytes. Raises CatalogueError."""
    names = _PRODUCT_NAMES[spec.provider]
    pools = [_pool_lines(spec, catalogue, index) for index in range(len(spec.gpu_pools))]
    pool_height, gap, top = 116, 24, 156
    inner = max(len(pools) * (pool_height + gap) - gap, 300)
    bottom = top + inner + 30
    height = bottom + 70
    addresses = ", ".join(spec.network.api_cidrs) or "only from inside"
    system = spec.system
    parts = [
        _text(24, 38, f"{spec.name} on {names['cluster']}, {spec.region}", "name"),
        _text(24, 62, f"Kubernetes {spec.kubernetes_version}, zones {', '.join(spec.zones)}", "soft"),
        f'<rect x="196" y="88" width="740" height="{bottom - 88}" rx="8"/>',
        _text(212, 112, f"{names['network']} {spec.network.cidr}", "title"),
        _text(212, 132, f"private nodes, outbound by NAT ({spec.network.nat}); Kubernetes API: {addresses}", "soft"),
        *_box(24, top, 148, 86, ["Clients", "HTTP and SSE,", "port 8000"]),
        *_box(24, top + 196, 148, 104, ["Administrators", "kubectl; Ray's", "dashboard by", "port-forward"]),
        *_box(
            212,
            top,
            300,
            inner,
            [
                f"System pool: {system.min} to {system.max} nodes",
                f"{system.instance_type}, always on demand",
            ],
            "system",
        ),
        *_box(230, top + 56, 264, 66, ["Service serve-app-serve-svc", "routes to ready workers"]),
        *_box(230, top + 132, 264, 80, ["Ray head", "GCS, autoscaler; no replicas", "access by token"]),
        *_box(230, top + 236, 122, 46, ["Redis"]),
        *_box(372, top + 236, 122, 46, ["Monitoring"]),
    ]
    for number, lines in enumerate(pools):
        y = top + number * (pool_height + gap)
        parts += _box(600, y, 320, pool_height, lines, "gpu autoscaled")
        parts.append(_arrow((494, top + 89), (548, top + 89), (548, y + 40), (596, y + 40)))
        parts.append(_arrow((498, top + 172), (572, top + 172), (572, y + 80), (596, y + 80), both=True))
    parts += [
        _arrow((172, top + 43), (190, top + 43), (190, top + 89), (226, top + 89)),
        _arrow((172, top + 248), (200, top + 248), (200, top + 172), (226, top + 172)),
        _arrow((291, top + 212), (291, top + 232)),
        _text(
            24, bottom + 30, f"Image from {names['registry']}; disks and secrets encrypted ({names['keys']}).", "soft"
        ),
        _text(24, bottom + 50, "Dashed: autoscaled with the load; nodes that do not run cost nothing.", "soft"),
    ]
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(spec.name)} on {names["cluster"]}">\n'
        f"  <style>{_STYLE}  </style>\n"
        '  <defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path d="M 0 0 L 8 4 L 0 8 Z"/></marker></defs>\n'
        f"{body}\n</svg>\n"
    )
