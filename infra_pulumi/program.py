"""The program for whoever runs Pulumi's CLI by hand: `pulumi up` in this folder.

`pulumi config set spec cluster.yaml` names the description; a relative path is meant from where this file is, and that
of the service's config from the folder above. Before a second `pulumi up` look at the nodes that the autoscaler added,
or they are taken away: `pulumi refresh --target '**NodeGroup::**'` on AWS, `'**AgentPool::**'` on Azure.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pulumi

from infra_pulumi import catalogue
from infra_pulumi.plan import program
from infra_pulumi.spec import load


def main() -> None:
    """Raises SpecError with every fault of the description."""
    here = Path(__file__).parent
    spec = load(here / pulumi.Config().require("spec"))
    known = catalogue.load()
    catalogue.check(spec, known)
    program(spec, known, datetime.now(UTC).strftime("%Y-%m-01T00:00:00Z"), here.parent)


if __name__ == "__main__":  # as Pulumi's language host runs it
    main()
