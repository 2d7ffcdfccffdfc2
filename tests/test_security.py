"""What holds for the whole source: no code from data, and a security page whose tests exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_locks import pinned

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/security.md"
FILES = sorted(
    file for folder in ("alerts", "infra_pulumi", "perf", "serve_app") for file in (ROOT / folder).rglob("*.py")
)
# Modules that execute code from the data that they read.
MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "ray.cloudpickle", "shelve"}
CALLS = {
    *("eval", "exec", "__import__", "torch.load", "numpy.load", "np.load", "os.system", "os.popen"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
# Ray pickles the autoscaling policy by value. The module registers the modules of the policy, and reads no pickles.
EXEMPT = {("serve_app/deployments/autoscaling.py", "ray.cloudpickle")}
# Loaders of yaml.load, each of which is a yaml.SafeLoader.
SAFE_LOADERS = {"serve_app/serve_file.py": "_Loader", "infra_pulumi/catalogue.py": "loader"}
CYCLONEDX = ROOT / ".venv-audit/bin/cyclonedx-py"


def banned(source: str, file: str) -> Iterator[str]:
    """What a file uses that can execute code from data."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            case ast.Call():
                yield from _banned_call(node, file)
        yield from (name for name in names if name in MODULES and (file, name) not in EXEMPT)


def _banned_call(call: ast.Call, file: str) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in CALLS:
        yield name
    if keywords.get("shell", "False") != "False":
        yield "shell=True"
    if keywords.get("allow_pickle", "False") != "False":
        yield "allow_pickle"
    if keywords.get("weights_only") == "False":
        yield "weights_only=False"
    if name == "yaml.load":
        loader = keywords.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "none")
        if loader not in ("yaml.SafeLoader", "yaml.CSafeLoader", SAFE_LOADERS.get(file)):
            yield f"yaml.load with {loader}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("from ray import cloudpickle", "ray.cloudpickle"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("yaml.load(text, yaml.Loader)", "yaml.load with yaml.Loader"),
        ("yaml.load(text)", "yaml.load with none"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("reader.open(path, allow_pickle=True)", "allow_pickle"),
        ("model.eval()", None),
        ("re.compile(text)", None),
        ("yaml.load(text, yaml.SafeLoader)", None),
    ],
)
def test_code_from_data_is_found(line: str, found: str | None) -> None:
    assert next(banned(line, "file.py"), None) == found


def test_no_code_comes_from_data() -> None:
    assert len(FILES) > 200
    found = {str(file.relative_to(ROOT)): [*banned(file.read_text(), str(file.relative_to(ROOT)))] for file in FILES}
    assert {file: names for file, names in found.items() if names} == {}


def test_the_loaders_of_yaml_are_safe() -> None:
    import yaml

    from serve_app import serve_file

    assert issubclass(serve_file._Loader, yaml.SafeLoader)
    assert 'getattr(yaml, "CSafeLoader", yaml.SafeLoader)' in (ROOT / "infra_pulumi/catalogue.py").read_text()


def test_each_test_of_the_security_page_exists() -> None:
    """The page names them as `tests/file.py::test_name`, or `tests/file.py`."""
    references = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text())
    missing = [
        f"{file}::{name}"
        for file, name in references
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]
    assert missing == []
    assert len(references) > 40


def test_each_threat_has_a_defence_and_a_test() -> None:
    table = PAGE.read_text().partition("## Threats")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 3, row
        assert all(cell.strip() for cell in row), row
        assert "`tests/" in row[2] or "None:" in row[2], row


@pytest.mark.skipif(not CYCLONEDX.exists(), reason="make test installs cyclonedx-py")
def test_the_bill_of_materials_has_each_pinned_package(tmp_path: Path) -> None:
    """Without a network, as `make sbom` writes it."""
    file = tmp_path / "sbom.cdx.json"
    makefile = (ROOT / "Makefile").read_text()
    options = re.search(r"cyclonedx-py (requirements .*) -o sbom.cdx.json$", makefile, re.MULTILINE)
    assert options is not None
    command = [str(CYCLONEDX), *options[1].split(), "-o", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    bill = json.loads(file.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "serve_app"
    assert all(component["purl"].startswith("pkg:pypi/") for component in bill["components"])
    found = {canonicalize_name(each["name"]): Version(each["version"]) for each in bill["components"]}
    assert found == pinned("requirements.lock")
