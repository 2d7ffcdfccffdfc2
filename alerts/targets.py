"""Whether the service and Ray are there, as a Prometheus on this machine sees it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["up", "down", "unknown"]
Target: TypeAlias = dict[str, Any]


def look(prometheus: str, ray_file: Path) -> dict[str, tuple[State, str]]:
    """By job its state and a sentence about it; nothing while `prometheus` (host:port) has not looked itself."""
    try:
        with urllib.request.urlopen(f"http://{prometheus}/api/v1/targets?state=active", timeout=5) as answer:
            targets: list[Target] = json.load(answer)["data"]["activeTargets"]
    except (OSError, ValueError):
        return {}
    service = [target for target in targets if target["labels"]["job"] == "serve_app"]
    ray = [target for target in targets if target["labels"]["job"] == "ray"]
    if not service or any(target["health"] == "unknown" for target in (*service, *ray)):
        return {}
    return {"serve_app": _service(service[0]), "ray": _ray(ray, ray_file)}


def _service(target: Target) -> tuple[State, str]:
    if target["health"] == "up":
        return "up", f"the service is up: {target['scrapeUrl']} is scraped every 15 s"
    return "down", (
        f"the service does not answer: {target['lastError']}; after a minute of that ServiceDown fires. "
        "Start it with `make serve`, or say where it is with --url"
    )


def _ray(targets: list[Target], file: Path) -> tuple[State, str]:
    if not targets:
        return "unknown", (
            f"Ray is not found: {file} lists nothing yet; alerts about nodes and deployments are silent. It comes with "
            "a Ray on this machine; for one with another RAY_TMPDIR say where: --ray-metrics FILE"
        )
    if not any(target["health"] == "up" for target in targets):
        return "down", f"Ray does not answer: none of the addresses ({len(targets)}) that {file} lists"
    return "up", f"Ray is up: scraped every 15 s at the addresses that {file} lists"
