"""Deploys, reads and destroys a stack through Pulumi's Automation API. By default the state is a local folder."""

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

VERSION = "3.272.0"  # the SDK's version in pyproject.toml; the CLI should have the same one

# Resources whose updates include the number of nodes. GKE updates each setting separately.
AUTOSCALED_TYPES = {"aws": "aws:eks/nodeGroup:NodeGroup", "azure": "azure-native:containerservice:AgentPool"}

INSTALL = f"""\
Pulumi's CLI is not on PATH. It is one program and needs no account:

  curl -fsSL https://get.pulumi.com | sh -s -- --version {VERSION}
  export PATH="$HOME/.pulumi/bin:$PATH"

On macOS you can run `brew install pulumi/tap/pulumi` instead. Then repeat the command. The commands `plan`, `cost`,
`policy`, `catalogue` and `render` do not need the CLI."""

PASSPHRASE = """\
Pulumi encrypts secrets in its state with a passphrase, and no passphrase is set. Choose one and keep it: without it the
state cannot be read again.

  export PULUMI_CONFIG_PASSPHRASE_FILE=$HOME/.serve-app-passphrase   # a file with the passphrase
  export PULUMI_CONFIG_PASSPHRASE=...                                # or the passphrase itself"""


_PASSPHRASES = {"PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE"}


class MissingError(Exception):
    """A required program or setting is missing. The message states how to provide it."""


class DeployError(Exception):
    """Pulumi failed. The message has the cause and the next step."""


@dataclass(frozen=True, slots=True)
class StateLocation:
    """Where Pulumi keeps its state: a folder, or a backend URL such as s3://bucket."""

    state: Path
    backend: str = ""

    @property
    def url(self) -> str:
        return self.backend or f"file://{self.state.absolute()}"


def find_command() -> auto.PulumiCommand:
    """Find Pulumi's CLI on PATH. Raises MissingError."""
    if shutil.which("pulumi") is None:
        raise MissingError(INSTALL)
    return auto.PulumiCommand()


def open_stack(
    spec: ClusterSpec,
    catalogue: Catalogue,
    location: StateLocation,
    command: auto.PulumiCommand,
    now: datetime | None = None,
) -> auto.Stack:
    """Open the description's stack and create it if it does not exist. Raises MissingError and DeployError."""
    # Pulumi's own service (an https URL) manages keys; a bucket or a folder does not.
    if not location.backend.startswith("https:") and not _PASSPHRASES & set(os.environ):
        raise MissingError(PASSPHRASE)
    if not location.backend:
        try:
            location.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeployError(f"--state {location.state}: {error.strerror}; pass the path of a folder") from None
    month = (now or datetime.now(UTC)).strftime("%Y-%m-01T00:00:00Z")
    settings = auto.ProjectSettings(
        name=PROJECT,
        runtime="python",
        backend=auto.ProjectBackend(url=location.url),
        description="A cluster with GPU nodes for serve_app",
    )
    options = auto.LocalWorkspaceOptions(project_settings=settings, pulumi_command=command)
    return _run_pulumi(
        lambda: auto.create_or_select_stack(
            stack_name=spec.name,
            project_name=PROJECT,
            program=lambda: program(spec, catalogue, month),
            opts=options,
        ),
        "nothing was changed; correct the cause and repeat the command",
    )


def update(stack: auto.Stack, provider: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Create or update the stack and return its outputs. Raises DeployError.

    Node groups are refreshed first: the autoscaler sets their number of nodes, and Pulumi, which ignores changes of
    that number, otherwise sends the number in its state. Other resources are not refreshed: AKS returns all pools of a
    cluster, which Pulumi would treat as a change (pulumi-azure-native#1532).
    """

    def refresh_and_update() -> auto.UpResult:
        if kinds := AUTOSCALED_TYPES.get(provider):
            stack.refresh(target=[f"**{kinds}::**"], on_output=log, color="never", suppress_progress=True)
        return stack.up(on_output=log, color="never", suppress_progress=True)

    done = _run_pulumi(
        refresh_and_update,
        "created resources remain; repeat the command to continue where Pulumi stopped, or delete everything with "
        "`destroy`",
    )
    return {name: value.value for name, value in done.outputs.items()}


def outputs(stack: auto.Stack) -> dict[str, Any]:
    """The outputs of the last update. Raises DeployError."""
    found = _run_pulumi(stack.outputs, "check that the stack has been deployed")
    return {name: value.value for name, value in found.items()}


def destroy(stack: auto.Stack, log: Callable[[str], None]) -> None:
    """Delete all resources of the stack. Raises DeployError."""
    _run_pulumi(
        lambda: stack.destroy(on_output=log, color="never", suppress_progress=True),
        "remaining resources still cost money; repeat the command. To delete protected resources, first deploy the "
        "description with protect: false",
    )


def _run_pulumi(action: Callable[[], Any], next_step: str) -> Any:
    """Run an action of Pulumi and map its errors to DeployError with the next step."""
    try:
        return action()
    except auto.ConcurrentUpdateError as error:
        raise DeployError(
            "another update of this stack is running or was killed; wait for it to end, or, if none is running, run: "
            f"pulumi cancel\n{_tail(str(error))}"
        ) from None
    except auto.CommandError as error:
        raise DeployError(f"Pulumi failed: {_tail(str(error))}\n\nNext step: {next_step}.") from None


def _tail(text: str, lines: int = 20) -> str:
    """The last lines, where Pulumi prints the cause."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
