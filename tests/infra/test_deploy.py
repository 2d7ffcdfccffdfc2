"""Deployments through Pulumi's Automation API, with a fake CLI that records its arguments."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pulumi import automation as auto
from semver import VersionInfo

from infra_pulumi import catalogue, deploy
from infra_pulumi.__main__ import main
from infra_pulumi.spec import parse
from tests.infra.helpers import document, install_pulumi, recorded

pytestmark = pytest.mark.infra
EXAMPLE = ["--provider", "aws", "--instance-type", "g5.xlarge"]


class Command(auto.PulumiCommand):
    """A fake of Pulumi's CLI for the Automation API. `fails` maps a verb to the error text of Pulumi."""

    def __init__(self, **fails: str) -> None:
        self.command = "pulumi"
        self.version = VersionInfo.parse(deploy.VERSION)
        self.calls: list[list[str]] = []
        self.environment: dict[str, str] = {}
        self.fails = fails

    def run(
        self,
        args: list[str],
        cwd: str,
        additional_env: dict[str, str],
        on_output: Callable[[str], Any] | None = None,
        on_error: Callable[[str], Any] | None = None,
    ) -> auto.CommandResult:
        self.calls.append(args)
        self.environment |= additional_env
        self.settings = (Path(cwd) / "Pulumi.yaml").read_text()
        for verb, text in self.fails.items():
            if verb in args:
                raise auto.errors.create_command_error(auto.CommandResult(stdout="", stderr=text, code=255))
        if on_output and args[0] in ("up", "destroy"):
            on_output(f"{args[0]} is under way")
        return auto.CommandResult(stdout=self.answer(args), stderr="", code=0)

    def answer(self, args: list[str]) -> str:
        if "output" in args:
            return json.dumps({"cluster_name": "serve-app", "endpoint": "https://example.org"})
        if "history" in args:
            when = "2026-11-27T12:00:00.000Z"
            done = {"kind": "update", "startTime": when, "message": "", "environment": {}, "config": {}}
            return json.dumps([{**done, "result": "succeeded", "endTime": when, "version": 1, "resourceChanges": {}}])
        return "{}"

    def verbs(self) -> list[str]:
        return [args[0] if args[0] != "stack" else f"stack {args[1]}" for args in self.calls]


@pytest.fixture(autouse=True)
def passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "passphrase")


def open_stack(command: Command, state: Path) -> auto.Stack:
    now = datetime(2026, 11, 27, tzinfo=UTC)
    return deploy.open_stack(parse(document()), catalogue.load(), deploy.StateLocation(state), command, now)


def test_an_update_keeps_its_state_in_a_folder_and_returns_the_outputs(tmp_path: Path) -> None:
    command, log = Command(), list[str]()
    outputs = deploy.update(open_stack(command, tmp_path / "state"), "aws", log.append)
    assert outputs == {"cluster_name": "serve-app", "endpoint": "https://example.org"}
    assert log == ["up is under way"]
    assert command.verbs()[0].startswith("stack")
    assert "up" in command.verbs()
    assert f"file://{tmp_path / 'state'}" in command.settings
    assert (tmp_path / "state").is_dir()


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_an_update_first_refreshes_the_node_groups(provider: str, tmp_path: Path) -> None:
    command = Command()
    deploy.update(open_stack(command, tmp_path), provider, lambda text: None)
    if provider == "gcp":
        assert "refresh" not in command.verbs()
        return
    (refresh,) = [args for args in command.calls if args[0] == "refresh"]
    assert command.verbs().index("refresh") < command.verbs().index("up")
    groups = {each.type for each in recorded(provider).resources if each.ignore_changes and "pool" in each.name}
    assert [refresh[n + 1] for n, word in enumerate(refresh) if word == "--target"] == [
        f"**{kind}::**" for kind in groups
    ]


def test_destroy_runs_pulumi_destroy_once(tmp_path: Path) -> None:
    command = Command()
    deploy.destroy(open_stack(command, tmp_path), lambda text: None)
    assert command.verbs().count("destroy") == 1


def test_a_backend_url_creates_no_state_folder(tmp_path: Path) -> None:
    command = Command()
    location = deploy.StateLocation(tmp_path / "state", "s3://bucket")
    deploy.open_stack(parse(document()), catalogue.load(), location, command)
    assert "s3://bucket" in command.settings
    assert not (tmp_path / "state").exists()


def test_a_bucket_needs_a_passphrase_but_pulumis_service_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PULUMI_CONFIG_PASSPHRASE")
    for backend, refused in (("s3://bucket", True), ("https://api.pulumi.com", False)):
        command = Command()
        with pytest.raises(deploy.MissingError) if refused else nullcontext():
            deploy.open_stack(parse(document()), catalogue.load(), deploy.StateLocation(tmp_path, backend), command)
        assert bool(command.calls) is not refused


def test_a_state_path_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(deploy.DeployError, match="pass the path of a folder"):
        open_stack(Command(), tmp_path / "state")


@pytest.mark.parametrize(
    ("verb", "action", "next_step"),
    [
        ("up", lambda stack: deploy.update(stack, "aws", print), "repeat the command to continue where Pulumi stopped"),
        (
            "destroy",
            lambda stack: deploy.destroy(stack, print),
            "remaining resources still cost money; repeat the command",
        ),
    ],
)
def test_a_failure_states_the_next_step(
    verb: str, action: Callable[[auto.Stack], Any], next_step: str, tmp_path: Path
) -> None:
    stack = open_stack(Command(**{verb: "error: VcpuLimitExceeded"}), tmp_path)
    with pytest.raises(deploy.DeployError) as caught:
        action(stack)
    assert "VcpuLimitExceeded" in str(caught.value)
    assert next_step in str(caught.value)


def test_a_concurrent_update_has_its_own_message(tmp_path: Path) -> None:
    stack = open_stack(Command(up="[409] Conflict: Another update is currently in progress."), tmp_path)
    with pytest.raises(deploy.DeployError, match="pulumi cancel"):
        deploy.update(stack, "aws", print)


def test_without_a_passphrase_pulumi_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULUMI_CONFIG_PASSPHRASE")
    command = Command()
    with pytest.raises(deploy.MissingError, match="export PULUMI_CONFIG_PASSPHRASE_FILE"):
        open_stack(command, tmp_path)
    assert command.calls == []


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the calls of a fake `pulumi` program, which is the first one on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return install_pulumi(tmp_path)


@contextmanager
def standard_input(stream: io.StringIO) -> Iterator[None]:
    original, sys.stdin = sys.stdin, stream
    try:
        yield
    finally:
        sys.stdin = original


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_command_line_deploys_prints_outputs_and_destroys(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ["--state", str(tmp_path / "state")]
    assert main(["deploy", *EXAMPLE, *state, "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster_name"] == "serve-app"
    assert main(["outputs", *EXAMPLE, *state]) == 0
    assert json.loads(capsys.readouterr().out)["cluster_name"] == "serve-app"
    assert main(["destroy", *EXAMPLE, *state, "--yes"]) == 0
    verbs = [line.split()[1] for line in calls.read_text().splitlines()]
    assert verbs.index("refresh") < verbs.index("up") < verbs.index("destroy")


@pytest.mark.parametrize("stream", [io.StringIO("serve-app\n"), Terminal(), Terminal("other\n")])
def test_without_a_confirmation_nothing_is_destroyed(stream: io.StringIO, calls: Path, tmp_path: Path) -> None:
    """The input is not a terminal, ends, or has another cluster's name."""
    with standard_input(stream):
        assert main(["destroy", *EXAMPLE, "--state", str(tmp_path / "state")]) == 1
    assert calls.read_text() == ""


def test_the_clusters_name_on_a_terminal_is_a_confirmation(calls: Path, tmp_path: Path) -> None:
    with standard_input(Terminal("serve-app\n")):
        assert main(["destroy", *EXAMPLE, "--state", str(tmp_path / "state")]) == 0
    assert "destroy" in calls.read_text()


def test_policy_errors_prevent_a_deployment(calls: Path, tmp_path: Path) -> None:
    flags = ["--provider", "gcp", "--instance-type", "g2-standard-4", "--production", "--zone", "us-central1-a"]
    assert main(["deploy", *flags, "--yes", "--state", str(tmp_path / "state")]) == 1
    assert calls.read_text() == ""
