"""`python -m perf.simulate`: simulates a service with up to thousands of replicas and compares strategies."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from perf import cost, export, machine
from perf.exits import Exit
from perf.progress import LiveLine
from perf.simulate import options, report
from perf.simulate.results import Simulation, SimulationRun
from perf.simulate.runner import run_all, run_apart
from perf.simulate.settings import MEANINGS, Job
from perf.simulate.table import table
from perf.simulate.verdict import backlog_bar, bars

TOOL = "serve_app perf.simulate"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser()
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(f"{name:<14} {meaning}" for name, meaning in MEANINGS.items()))
        return Exit.OK
    command = ["python", "-m", "perf.simulate", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        jobs = options.jobs(args, cost.find(args.instance_type).usd_per_hour)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    started_at, began = datetime.now(UTC), time.monotonic()
    try:
        simulations = _simulate(jobs, args.jobs)
        profiles = {job.profile.start_s: job.profile for job in jobs}
        backlogs = [run_apart(backlog_bar, profile, args.seed) for profile in profiles.values()]
    except KeyboardInterrupt:
        print("interrupted; no results were written", file=sys.stderr)
        return Exit.INTERRUPTED
    first = jobs[0]
    run = SimulationRun(
        tool=TOOL,
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        command=command,
        commit=machine.commit(),
        machine=machine.describe(),
        scale=args.scale,
        seed=args.seed,
        users=first.traffic.users,
        settings={
            "replica": asdict(first.profile),
            "traffic": asdict(first.traffic),
            "losses": asdict(first.losses),
            "service": asdict(first.fleet),
        },
        simulations=simulations,
        bars=[*bars(simulations), *backlogs],
    )
    return _show(run, args.output)


def _simulate(jobs: Sequence[Job], processes: int) -> list[Simulation]:
    line, began, shown = LiveLine(), time.monotonic(), -1e9

    def progress(shares: list[float]) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < line.interval_s:
            return
        shown, done = now, sum(shares) / len(shares)
        running = [job.name for job, share in zip(jobs, shares, strict=True) if 0 < share < 1]
        left = f", {(now - began) * (1 - done) / done:.0f} s left" if done > 0.02 else ""
        bar = "#" * round(20 * done)
        line.show(f"[{bar:<20}] {done:4.0%}{left}: {'; '.join(running)}")

    try:
        return run_all(jobs, processes, progress)
    finally:
        line.clear()


def _show(run: SimulationRun, folder: Path) -> int:
    print(table(run.simulations))
    print()
    for bar in run.bars:
        mark = "met   " if bar.met else "MISSED"
        print(textwrap.fill(f"{mark} {bar.name}: {bar.measured}", 100, subsequent_indent=" " * 7))
    written = [folder / "results.json", folder / "report.html"]
    try:
        export.write(written[0], run.model_dump_json(indent=1))
        export.write(written[1], report.render(run))
    except OSError as error:
        print(f"perf.simulate: {error.filename}: {error.strerror}; give another --output", file=sys.stderr)
        return Exit.USAGE
    print(f"\n{' '.join(map(str, written))}")
    return Exit.OK if all(bar.met for bar in run.bars) else Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
