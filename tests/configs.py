"""Configurations for tests: the smallest valid args, and Ray Serve config files around them."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from serve_app.config import Section

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
    return {"http_options": {"host": "127.0.0.1"}, "applications": [{**usual, **application}]}


def gpu_examples() -> list[list[dict[str, Any]]]:
    """The lists of models in the chapter of docs/deploy.md about GPUs."""
    _, _, chapter = (SHIPPED.parent / "docs/deploy.md").read_text().partition("\n## A model on GPUs\n")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", chapter.split("\n## ")[0], re.DOTALL)]


def members(annotation: Any) -> list[Any]:
    """The types of a field: those of a union, without what `Annotated` adds."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]


def kind_of(section: type[Section]) -> str:
    """The value of `kind`, of a section of which there are several; else ""."""
    field = section.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field is not None else ""
