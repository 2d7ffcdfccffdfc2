"""Pulumi's engine, driven through its Automation API: update, outputs, destroy. State is a folder by default."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pulumi import automation as auto

from infra_pulumi.catalogue import Catalogue
from infra_pulumi.plan import program
from infra_pulumi.record import PROJECT
from infra_pulumi.spec import ClusterSpec

VERSION = "3.272.0"  # of the SDK in pyproject.toml, which the CLI should be too

# The resources whose number of nodes is sent with every other change. GKE takes changes one by one.
COUNTED = {"aws": "aws:eks/nodeGroup:NodeGroup", "azure": "azure-native:containerservice:AgentPool"}

INSTALL = f"""\
Pulumi's CLI is not on PATH. It is one program, and needs no account:

  curl -fsSL https://get.pulumi.com | sh -s -- --version {VERSION}
  export PATH="$HOME/.pulumi/bin:$PATH"

or, on a Mac, brew install pulumi/tap/pulumi. Then run the same command again. `plan`, `cost`, `policy` and `catalogue`
need none of it."""

PASSPHRASE = """\
Secrets in the state are encrypted with a passphrase, and none is set. Choose one, and keep it: without it the state
cannot be read again.

  export PULUMI_CONFIG_PASSPHRASE_FILE=$HOME/.serve-app-passphrase   # a file that holds it
  export PULUMI_CONFIG_PASSPHRASE=...                                # or the passphrase itself"""


_PASSPHRASES = {"PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE"}


class MissingError(Exception):
    """Something that is needed is not here; the text says how to get it."""


class DeployError(Exception):
    """Pulumi failed; the text says with what, and what to do now."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where state is kept: a folder, or a backend of Pulumi's such as s3://bucket."""

    state: Path
    backend: str = ""

    @property
    def url(self) -> str:
        return self.backend or f"file://{self.state.absolute()}"


def find_command() -> auto.PulumiCommand:
    """The CLI on PATH. Raises MissingError."""
    if shutil.which("pulumi") is None:
        raise MissingError(INSTALL)
    return auto.PulumiCommand()


def open_stack(
    spec: ClusterSpec, catalogue: Catalogue, place: Place, command: auto.PulumiCommand, now: datetime | None = None
) -> auto.Stack:
    """The stack of a description, made if it is not there. Raises MissingError and DeployError."""
    # Pulumi's own service keeps keys, and is reached by HTTPS; a bucket or a folder does not.
    if not place.backend.startswith("https:") and not _PASSPHRASES & set(os.environ):
        raise MissingError(PASSPHRASE)
    if not place.backend:
        try:
            place.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeployError(f"--state {place.state}: {error.strerror}; name a folder") from None
    month = (now or datetime.now(UTC)).strftime("%Y-%m-01T00:00:00Z")
    settings = auto.ProjectSettings(
        name=PROJECT, runtime="python", backend=auto.ProjectBackend(url=place.url), description="GPU nodes of serve_app"
    )
    options = auto.LocalWorkspaceOptions(project_settings=settings, pulumi_command=command)
    return _told(
        lambda: auto.create_or_select_stack(
            stack_name=spec.name,
            project_name=PROJECT,
            program=lambda: program(spec, catalogue, month),
            opts=options,
        ),
        "nothing was changed",
    )


def update(stack: auto.Stack, provider: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Make it so. What the stack tells of itself afterwards. Raises DeployError.

    The node groups are looked at first: how many nodes one has is the autoscaler's to say, and Pulumi, told to leave
    that alone, sends what it saw last. Nothing else is: AKS tells of a cluster more than was asked for, its other
    pools, which Pulumi would take for a change (pulumi-azure-native#1532).
    """

    def make() -> auto.UpResult:
        if kinds := COUNTED.get(provider):
            stack.refresh(target=[f"**{kinds}::**"], on_output=say, color="never", suppress_progress=True)
        return stack.up(on_output=say, color="never", suppress_progress=True)

    done = _told(
        make,
        "what was made stays; run the same command again and Pulumi goes on where it stopped, or take all of it down "
        "with `destroy`",
    )
    return {name: value.value for name, value in done.outputs.items()}


def outputs(stack: auto.Stack) -> dict[str, Any]:
    """What the stack told of itself last. Raises DeployError."""
    told = _told(stack.outputs, "has it been deployed?")
    return {name: value.value for name, value in told.items()}


def destroy(stack: auto.Stack, say: Callable[[str], None]) -> None:
    """Take everything down. Raises DeployError."""
    _told(
        lambda: stack.destroy(on_output=say, color="never", suppress_progress=True),
        "what is left still costs; run the same command again. What is protected is only deleted after a deploy of the "
        "description with protect: false",
    )


def _told(action: Callable[[], Any], then: str) -> Any:
    """What an action of Pulumi's gives, or its failure in words."""
    try:
        return action()
    except auto.ConcurrentUpdateError as error:
        raise DeployError(
            "another update of this stack is under way, or was killed; wait for it, or if nobody runs one: "
            f"pulumi cancel\n{_tail(str(error))}"
        ) from None
    except auto.CommandError as error:
        raise DeployError(f"Pulumi failed: {_tail(str(error))}\n\nNow: {then}.") from None


def _tail(text: str, lines: int = 20) -> str:
    """Pulumi prints the cause last."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
