"""The Pulumi program for use with Pulumi's CLI: `pulumi up` in this folder.

`pulumi config set spec cluster.yaml` sets the description. A relative path is resolved against this folder, and the
path of the service's config against the folder above. Before each further `pulumi up`, run `pulumi refresh --target
'**NodeGroup::**'` on AWS or `'**AgentPool::**'` on Azure; otherwise the update removes nodes that the autoscaler added.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pulumi

from infra_pulumi import catalogue
from infra_pulumi.plan import program
from infra_pulumi.spec import load


def main() -> None:
    """Run the program for the description in the stack's configuration. Raises SpecError with all faults."""
    here = Path(__file__).parent
    spec = load(here / pulumi.Config().require("spec"))
    machines = catalogue.load()
    catalogue.check(spec, machines)
    program(spec, machines, datetime.now(UTC).strftime("%Y-%m-01T00:00:00Z"), here.parent)


if __name__ == "__main__":  # Pulumi's language host runs this file as a script
    main()
