"""Who may import whom, and that the map of the house is the house."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "serve_app"
SOURCES = sorted(path.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("*.py"))

DECIDING = {"sequence", "scheduler", "slots", "stream", "toy", "detokenizer", "memory", "engine", "__init__"}
TORCH = {"torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub"}
PLAIN = {"serve_app.types", "serve_app.errors", "serve_app.config"}


def allowed(path: str) -> set[str]:
    """Prefixes of the modules that a file may import, the standard library besides."""
    room, _, name = path.rpartition("/")
    if room == "api":
        return {"starlette", "pydantic", "pydantic_core", "serve_app.api", *PLAIN}
    if room == "engine" and name.removesuffix(".py") in DECIDING:
        return {*(f"serve_app.engine.{module}" for module in DECIDING), *PLAIN}
    if room == "engine":
        return {*TORCH, "jinja2", "filelock", "tqdm", "serve_app.engine", *PLAIN}
    if room == "deployments":
        metrics = {"prometheus_client"} if name in ("metrics.py", "hub.py") else set()
        return {
            "ray",
            "starlette.types",
            "serve_app.api",
            "serve_app.engine",
            "serve_app.deployments",
            *metrics,
            *PLAIN,
        }
    return {
        "types.py": set(),
        "errors.py": set(),
        "config.py": {"pydantic", "yaml", "serve_app.errors"},
        "app.py": {"ray", "serve_app.config", "serve_app.deployments"},
        "__main__.py": {"ray", "serve_app.app", "serve_app.config", "serve_app.deployments"},
        "__init__.py": set(),
    }[path]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are named in full"
            assert node.module is not None
            yield node.module


def within(module: str, prefixes: set[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("path", SOURCES)
def test_a_file_imports_only_what_its_room_may(path: str) -> None:
    found = set(imports(ast.parse((HOUSE / path).read_text())))
    foreign = {module for module in found if module.split(".")[0] not in sys.stdlib_module_names}
    assert {module for module in foreign if not within(module, allowed(path))} == set()


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("serve_app.app", TORCH),
        ("serve_app.__main__", {*TORCH, "ray"}),
        ("serve_app.api.app", {*TORCH, "ray"}),
        ("serve_app.engine.engine", {*TORCH, "ray", "starlette"}),
    ],
)
def test_what_is_heavy_is_loaded_only_where_it_works(module: str, kept_out: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & kept_out == set()


def test_the_map_names_every_file_and_what_it_is_for() -> None:
    (drawn,) = re.findall(r"```\nserve_app/\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    entries = [line.split(maxsplit=1) for line in drawn.splitlines()]
    assert all(len(entry) == 2 for entry in entries), "a file without a word about it"
    files = [path for path in HOUSE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(path for path, _ in entries) == sorted(file.relative_to(HOUSE).as_posix() for file in files)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/decisions.md"])
def test_what_a_page_links_to_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    folders = re.findall(r"^\| `([a-z_]+/[a-z_/]*)`", text, re.MULTILINE)
    assert [name for name in [*links, *folders] if not ((ROOT / page).parent / name).exists()] == []
