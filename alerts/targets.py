"""The state of the scrape jobs `serve_app` and `ray` in a Prometheus on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from alerts.programs import get

State: TypeAlias = Literal["up", "down", "unknown"]
Target: TypeAlias = dict[str, Any]


def states(prometheus: str, ray_file: Path) -> dict[str, tuple[State, str]]:
    """State and explanation by job, or {} before `prometheus` (host:port) has scraped all targets once."""
    try:
        body = get(f"http://{prometheus}/api/v1/targets?state=active", 5)
        targets: list[Target] = json.loads(body)["data"]["activeTargets"]
    except (OSError, ValueError):
        return {}
    service = [target for target in targets if target["labels"]["job"] == "serve_app"]
    ray = [target for target in targets if target["labels"]["job"] == "ray"]
    if not service or any(target["health"] == "unknown" for target in (*service, *ray)):
        return {}
    return {"serve_app": _service(service[0]), "ray": _ray(ray, ray_file)}


def _service(target: Target) -> tuple[State, str]:
    if target["health"] == "up":
        return "up", f"the service is up: Prometheus scrapes {target['scrapeUrl']} every 15 s"
    return "down", (
        f"the service does not answer: {target['lastError']}. ServiceDown fires after 1 minute. "
        "Start the service with `make serve`, or give its address with --url"
    )


def _ray(targets: list[Target], file: Path) -> tuple[State, str]:
    if not targets:
        return "unknown", (
            f"Ray is not found: {file} lists no targets yet, so alerts about nodes and deployments cannot fire. Ray "
            "writes this file when it runs on this machine. If RAY_TMPDIR differs, give the file with --ray-metrics"
        )
    if not any(target["health"] == "up" for target in targets):
        return "down", f"Ray does not answer at any of the addresses ({len(targets)}) in {file}"
    return "up", f"Ray is up: Prometheus scrapes the addresses in {file} every 15 s"
