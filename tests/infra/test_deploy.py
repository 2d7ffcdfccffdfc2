"""The way to a cloud, driven through Pulumi's own Automation API with a command that writes down what it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pulumi import automation as auto
from semver import VersionInfo

from infra_pulumi import catalogue, deploy
from infra_pulumi.__main__ import main
from infra_pulumi.spec import parse
from tests.infra.helpers import document, recorded

pytestmark = pytest.mark.infra
EXAMPLE = ["--provider", "aws", "--instance-type", "g5.xlarge"]


class Command(auto.PulumiCommand):
    """Pulumi's CLI as far as the Automation API sees it. `fails` is a verb, with what Pulumi would say."""

    def __init__(self, **fails: str) -> None:
        self.command = "pulumi"
        self.version = VersionInfo.parse(deploy.VERSION)
        self.asked: list[list[str]] = []
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
        self.asked.append(args)
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
        return [args[0] if args[0] != "stack" else f"stack {args[1]}" for args in self.asked]


@pytest.fixture(autouse=True)
def passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "a test's")


def opened(command: Command, state: Path) -> auto.Stack:
    now = datetime(2026, 11, 27, tzinfo=UTC)
    return deploy.open_stack(parse(document()), catalogue.load(), deploy.Place(state), command, now)


def test_an_update_keeps_its_state_in_a_folder_and_tells_what_came_of_it(tmp_path: Path) -> None:
    command, said = Command(), list[str]()
    told = deploy.update(opened(command, tmp_path / "state"), "aws", said.append)
    assert told == {"cluster_name": "serve-app", "endpoint": "https://example.org"}
    assert said == ["up is under way"]
    assert command.verbs()[0].startswith("stack")
    assert "up" in command.verbs()
    assert f"file://{tmp_path / 'state'}" in command.settings
    assert (tmp_path / "state").is_dir()


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_nodes_that_the_autoscaler_added_are_seen_before_an_update(provider: str, tmp_path: Path) -> None:
    command = Command()
    deploy.update(opened(command, tmp_path), provider, lambda text: None)
    if provider == "gcp":
        assert "refresh" not in command.verbs()
        return
    (asked,) = [args for args in command.asked if args[0] == "refresh"]
    assert command.verbs().index("refresh") < command.verbs().index("up")
    groups = {each.type for each in recorded(provider).resources if each.ignore_changes and "pool" in each.name}
    assert [asked[n + 1] for n, word in enumerate(asked) if word == "--target"] == [f"**{kind}::**" for kind in groups]


def test_destroy_asks_for_it_once(tmp_path: Path) -> None:
    command = Command()
    deploy.destroy(opened(command, tmp_path), lambda text: None)
    assert command.verbs().count("destroy") == 1


def test_another_backend_needs_no_folder(tmp_path: Path) -> None:
    command = Command()
    place = deploy.Place(tmp_path / "state", "s3://bucket")
    deploy.open_stack(parse(document()), catalogue.load(), place, command)
    assert "s3://bucket" in command.settings
    assert not (tmp_path / "state").exists()


def test_a_bucket_needs_a_passphrase_and_pulumis_service_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULUMI_CONFIG_PASSPHRASE")
    for backend, refused in (("s3://bucket", True), ("https://api.pulumi.com", False)):
        command = Command()
        with pytest.raises(deploy.MissingError) if refused else nullcontext():
            deploy.open_stack(parse(document()), catalogue.load(), deploy.Place(tmp_path, backend), command)
        assert bool(command.asked) is not refused


def test_a_state_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(deploy.DeployError, match="name a folder"):
        opened(Command(), tmp_path / "state")


@pytest.mark.parametrize(
    ("verb", "action", "now"),
    [
        ("up", lambda stack: deploy.update(stack, "aws", print), "run the same command again and Pulumi goes on"),
        ("destroy", lambda stack: deploy.destroy(stack, print), "what is left still costs; run the same command again"),
    ],
)
def test_a_failure_says_what_to_do(verb: str, action: Callable[[auto.Stack], Any], now: str, tmp_path: Path) -> None:
    stack = opened(Command(**{verb: "error: VcpuLimitExceeded"}), tmp_path)
    with pytest.raises(deploy.DeployError) as caught:
        action(stack)
    assert "VcpuLimitExceeded" in str(caught.value)
    assert now in str(caught.value)


def test_a_lock_of_another_update_is_told_apart(tmp_path: Path) -> None:
    stack = opened(Command(up="[409] Conflict: Another update is currently in progress."), tmp_path)
    with pytest.raises(deploy.DeployError, match="pulumi cancel"):
        deploy.update(stack, "aws", print)


def test_without_a_passphrase_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULUMI_CONFIG_PASSPHRASE")
    command = Command()
    with pytest.raises(deploy.MissingError, match="export PULUMI_CONFIG_PASSPHRASE_FILE"):
        opened(command, tmp_path)
    assert command.asked == []


def test_the_command_line_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command()
    monkeypatch.setattr(deploy, "find_command", lambda: command)
    where = ["--state", str(tmp_path / "state")]
    assert main(["deploy", *EXAMPLE, *where, "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster_name"] == "serve-app"
    assert main(["outputs", *EXAMPLE, *where]) == 0
    assert main(["destroy", *EXAMPLE, *where, "--yes"]) == 0
    assert {"up", "destroy"} <= set(command.verbs())


def test_nobody_is_asked_where_nobody_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = Command()
    monkeypatch.setattr(deploy, "find_command", lambda: command)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["destroy", *EXAMPLE, "--state", str(tmp_path)]) == 1
    assert command.asked == []


def test_the_end_of_the_input_is_a_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    command = Command()
    monkeypatch.setattr(deploy, "find_command", lambda: command)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["destroy", *EXAMPLE, "--state", str(tmp_path)]) == 1
    assert command.asked == []


def test_what_the_policy_refuses_is_not_deployed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = Command()
    monkeypatch.setattr(deploy, "find_command", lambda: command)
    flags = ["--provider", "gcp", "--instance-type", "g2-standard-4", "--production", "--zone", "us-central1-a"]
    assert main(["deploy", *flags, "--yes", "--state", str(tmp_path)]) == 1
    assert command.asked == []
