"""Configurations for tests: the smallest valid args, and Ray Serve config files around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[1] / "serve_config.yaml"
DEPLOYMENT = {"num_replicas": 1, "max_ongoing_requests": 32, "max_queued_requests": 8}
MODEL = {"name": "m", "source": "builtin:toy", "deployment": DEPLOYMENT}


def app_args(**model: Any) -> dict[str, Any]:
    """Args with one model, which has the given keys besides the required ones."""
    document: dict[str, Any] = copied({"models": [{**MODEL, **model}], "ingress": {"deployment": DEPLOYMENT}})
    return document


def copied(document: Any) -> Any:
    """A deep copy without shared members, unlike copy.deepcopy: YAML writes shared members as aliases."""
    if isinstance(document, dict):
        return {key: copied(value) for key, value in document.items()}
    return [copied(value) for value in document] if isinstance(document, list) else document


def serve_document(**application: Any) -> dict[str, Any]:
    """A Ray Serve config with one application, which has the given keys besides the usual ones."""
    usual = {"name": "serve_app", "route_prefix": "/", "import_path": "serve_app.app:build", "args": app_args()}
    return {"applications": [{**usual, **application}]}
