"""The table of the tested clients in docs/api.md has the releases of the lock files."""

from __future__ import annotations

import json
import re

from tests.graph.service import ROOT

LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-clients.lock", "requirements-clients-openai2.lock")
NPM = json.loads((ROOT / "tests/clients/npm/package.json").read_text())["dependencies"]


def pinned(name: str) -> set[str]:
    """The releases of this package in the lock files."""
    locks = "\n".join((ROOT / lock).read_text() for lock in LOCKS)
    pattern = re.sub("[-_]", "[-_]", name)
    return set(re.findall(rf"(?im)^{pattern}==(\S+)$", locks))


def test_the_table_of_the_tested_clients_has_the_releases_of_the_lock_files() -> None:
    page = (ROOT / "docs/api.md").read_text()
    section = page.split("## Tested clients\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)`[^|]* \| (PyPI|npm) \| ([\d.]+) \|", section, re.MULTILINE)
    releases = {kind: {(name, release) for name, given, release in rows if given == kind} for kind in ("PyPI", "npm")}
    assert len(releases["PyPI"]) > 15
    assert {(name, release) for name, release in releases["PyPI"] if release not in pinned(name)} == set()
    assert releases["npm"] == set(NPM.items()) - {("zod", NPM["zod"])}  # zod makes schemas and sends no requests
