"""docs/configuration.md: its tables are those of the configuration's classes, its examples are valid."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import AwareDatetime
from pydantic.fields import FieldInfo

from serve_app.config import AppConfig, Section
from serve_app.deployments import cluster, haproxy
from serve_app.experiment_config import Experiments, check_models, parse_experiments
from serve_app.serve_file import Application, HttpOptions, IngressOptions
from tests.configs import app_args, kind_of, members

PAGE = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
HEADER = "| key | type | default | bounds | meaning |"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "mapping", NoneType: "null"}
TYPES[AwareDatetime] = "RFC 3339 time"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}


def sections(section: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section below `section` with its path, in the order of the keys."""
    for key, field in section.model_fields.items():
        below, suffix = f"{path}.{key}".removeprefix("."), "[]" if get_origin(field.annotation) is tuple else ""
        for kind in (found for member in members(field.annotation) for found in get_args(member) or (member,)):
            if isinstance(kind, type) and issubclass(kind, Section):
                name = f"{below}{suffix} ({kind_of(kind)})".removesuffix(" ()")
                yield name, kind
                yield from sections(kind, name)


SECTIONS: dict[str, type[Section]] = {
    "http_options": HttpOptions,
    "applications[]": Application,
    "args": AppConfig,
    **dict(sections(AppConfig)),
    "applications[].deployments[]": IngressOptions,
    "user_config": Experiments,
    **{f"user_config.{path}": kind for path, kind in sections(Experiments)},
}


def type_of(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        *others, last = dict.fromkeys(type_of(kind) for kind in members(annotation))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(annotation) is tuple:
        of_sections = isinstance(get_args(annotation)[0], type) and issubclass(get_args(annotation)[0], Section)
        return "list of sections" if of_sections else "list of strings"
    kind = get_origin(annotation) or annotation
    return TYPES.get(kind) or "section"


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, Section):
        pairs = ", ".join(f"{key}: {item}" for key, item in value.model_dump(exclude_unset=True).items())
        return f"`{{{pairs}}}`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def bounds_of(field: FieldInfo) -> str:
    found = []
    for constraint in field.metadata:
        if pattern := getattr(constraint, "pattern", None):
            found.append(f"`{pattern}`")
        found += [f"{sign} {getattr(constraint, name)}" for name, sign in BOUNDS.items() if hasattr(constraint, name)]
    return ", ".join(found)


def rows(section: type[Section]) -> list[str]:
    """The cells of each key but for its meaning."""
    return [
        f"| `{key}` | {type_of(field.annotation)} | {default_of(field)} | {bounds_of(field)} |"
        for key, field in section.model_fields.items()
    ]


def tables() -> dict[str, list[str]]:
    """The rows of each table of keys, by the section that its heading names."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^#{2,3} ", PAGE):
        heading, _, text = part.partition("\n")
        _, header, rest = text.partition(f"{HEADER}\n|---|---|---|---|---|\n")
        if header:
            lines = rest.split("\n\n")[0].splitlines()
            assert re.findall("`([^`]+)`", heading), heading
            found |= dict.fromkeys(re.findall("`([^`]+)`", heading), lines)
    return found


TABLES = tables()


def test_every_section_has_one_table() -> None:
    assert sorted(TABLES) == sorted(SECTIONS)
    headings = re.findall("(?m)^### .*`.*", PAGE)
    assert len(headings) == len({SECTIONS[path] for path in SECTIONS}), "a section that occurs twice has one table"


@pytest.mark.parametrize("path", SECTIONS)
def test_a_table_has_the_keys_of_its_section_with_types_defaults_and_bounds(path: str) -> None:
    cells, meanings = [], []
    for line in TABLES[path]:
        cell, meaning = re.fullmatch(r"(.*\|) ([^|]+) \|", line).groups()  # type: ignore[union-attr]
        cells.append(cell)
        meanings.append(meaning)
    assert cells == rows(SECTIONS[path])
    assert [meaning for meaning in meanings if not meaning.endswith(".")] == []


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(heading) for heading in re.findall("(?m)^#{2,4} (.*)$", text)}


def test_the_table_of_contents_has_every_heading() -> None:
    links = re.findall(r"\]\(#([^)]+)\)", PAGE.partition("\n## ")[0])
    assert len(links) == len(set(links))
    assert set(links) == anchors(PAGE)


def test_links_within_the_page_have_a_target() -> None:
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) - anchors(PAGE) == set()


@pytest.mark.parametrize("page", ["deploy.md", "operations.md"])
def test_links_to_other_pages_have_a_target(page: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    links = set(re.findall(rf"\]\({re.escape(page)}#([^)]+)\)", PAGE))
    assert links
    assert links - anchors(text) == set()


def test_the_examples_are_valid() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    keys = [
        "price",
        "cors",
        "response_cache",
        "auth",
        "auth",
        "batches",
        "quotas",
        "lora",
        "chat_template",
        "deployments",
        "models",
        "deployment",
    ]
    assert [list(block) for block in blocks] == [[key] for key in keys]
    (with_experiments,) = (block for block in blocks if "deployments" in block)
    blocks.remove(with_experiments)
    experiments = parse_experiments(with_experiments["deployments"][0]["user_config"])
    check_models(experiments, AppConfig.model_validate(app_args(name="smollm2-135m")), {})
    for block in blocks:
        AppConfig.model_validate(app_args() | block if block.keys() & AppConfig.model_fields else app_args(**block))


def test_every_variable_that_make_serve_sets_is_listed_with_its_value(tmp_path: Path) -> None:
    _, _, chapter = PAGE.partition("\n## What `make serve` sets for Ray\n")
    listed = dict[str, str]()
    for row in re.findall("(?m)^\\| `.*", chapter):
        _, names, values, *_ = row.split("|")
        found = [value.strip(" `") for value in values.split(", ")]
        listed |= dict(itertools.zip_longest(re.findall("`([^`]+)`", names), found, fillvalue=""))
    fixed = cluster._ENVIRONMENT | cluster._LOOPBACK_ONLY
    assert set(listed) == {*fixed, *haproxy.environment("/bin/true", tmp_path, longest_s=600)}
    assert {name: listed[name] for name in fixed} == fixed
