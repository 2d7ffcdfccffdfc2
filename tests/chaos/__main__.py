"""`python -m tests.chaos soak|chaos`: run the service under load with faults, print the figures and write them."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.chaos import run
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.stack import stack


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("program", choices=["soak", "chaos"], help="soak: load alone; chaos: with faults of the stack")
    parser.add_argument("--minutes", type=float, help="duration; default 30 for soak, and once each fault for chaos")
    parser.add_argument("--seed", type=int, default=1, help="of the order of requests and faults (default: 1)")
    parser.add_argument("--rate", type=float, default=15.0, help="requests per second (default: 15)")
    parser.add_argument("--share", type=float, default=0.01, help="share of requests with a fault (default: 0.01)")
    parser.add_argument("--faults", default="", help="only the faults of chaos whose name has this text")
    parser.add_argument("--output", type=Path, help="folder for the figures (default: .chaos/soak or .chaos/chaos)")
    options = parser.parse_args()
    soaks = options.program == "soak"
    minutes = options.minutes if options.minutes is not None else 30.0 * soaks
    wanted = run.Options(minutes * 60, options.seed, options.rate, options.share)
    chosen = [one for one in SCENARIOS if options.faults in one.name]
    if not chosen:
        parser.error(f"no fault has {options.faults!r} in its name")
    with (
        tempfile.TemporaryDirectory(prefix="sc") as folder,
        stack(Path(folder), ingresses=1 if soaks else 2) as running,
    ):
        found = asyncio.run(run.soak(running, wanted) if soaks else run.chaos(running, wanted, chosen))
    return run.output(options.output or Path(".chaos") / options.program, found)


if __name__ == "__main__":
    sys.exit(main())
