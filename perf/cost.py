"""The cost of a measured throughput on a cloud instance type; `python -m perf.cost` lists the known types."""

from __future__ import annotations

import datetime
import difflib
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from infra_pulumi.catalogue import STALE_DAYS, Catalogue, InstanceType, load
from perf.exits import Exit
from perf.results import Cost, Run, Stage

_LISTING = "`python -m perf.cost` lists the known types"


class CostError(ValueError):
    """The cost cannot be computed; the message gives the reason and a remedy."""


class UnknownInstanceType(CostError):
    pass


def find(name: str, catalogue: Catalogue | None = None) -> InstanceType:
    """Finds an instance type by `g5.xlarge`, `aws:g5.xlarge` or `aws:us-west-2:g5.xlarge`. Raises CostError.

    The default is the catalogue in infra_pulumi.
    """
    known = (catalogue or load()).instance_types
    found = [each for each in known if name.lower() in _names(each)]
    if not found:
        raise UnknownInstanceType(f"unknown instance type {name!r}{_suggestion(name, known)}; {_LISTING}")
    if len(found) > 1:
        raise CostError(f"{name!r} is ambiguous; write one of {', '.join(each.name for each in found)}")
    return found[0]


def _names(machine: InstanceType) -> set[str]:
    return {each.lower() for each in (machine.type, f"{machine.provider}:{machine.type}", machine.name)}


def _suggestion(name: str, known: Iterable[InstanceType]) -> str:
    types = {each.type.lower(): each.type for each in known}
    close = difflib.get_close_matches(name.rpartition(":")[2].lower(), types, n=3)
    return f"; did you mean {' or '.join(types[each] for each in close)}?" if close else ""


def cost(instance_type: str, run: Run, catalogue: Catalogue | None = None) -> Cost:
    """The cost at the stage that `best_stage` chooses. Raises CostError."""
    return stage_cost(instance_type, best_stage(run), catalogue)


def stage_cost(instance_type: str, stage: Stage, catalogue: Catalogue | None = None) -> Cost:
    """Raises CostError."""
    machine = find(instance_type, catalogue)
    name = f"{stage.scenario}, {stage.name}"
    if not (stage.tokens_per_s > 0 and stage.requests_per_s > 0):
        raise CostError(f"{name} finished no request, so it has no cost")
    usd_per_second = machine.usd_per_hour / 3600
    return Cost(
        instance_type=machine.type,
        provider=machine.provider,
        usd_per_hour=machine.usd_per_hour,
        as_of=machine.as_of.isoformat(),
        tokens_per_s=stage.tokens_per_s,
        stage=name,
        usd_per_million_output_tokens=usd_per_second / stage.tokens_per_s * 1e6,
        usd_per_thousand_requests=usd_per_second / stage.requests_per_s * 1e3,
    )


def best_stage(run: Run) -> Stage:
    """The stage with the highest throughput that met the run's SLO, if it has one. Raises CostError."""
    stages = [stage for stage in run.stages if not stage.client.limited]
    if run.slo is not None:  # a stage to which no bound applies, such as TTFT of a batch, did not meet it
        stages = [stage for stage in stages if stage.goodput is not None and not stage.missed]
        if run.stages and not stages:
            raise CostError(f"no stage met {run.slo}, so no throughput has a cost")
    if not stages:
        raise CostError("the run has no stage whose cost can be computed")
    return max(stages, key=lambda stage: stage.tokens_per_s)


def stale(as_of: str, today: datetime.date) -> str | None:
    """A warning if the price is old."""
    age = (today - datetime.date.fromisoformat(as_of)).days
    if age <= STALE_DAYS:
        return None
    return f"The price is from {as_of}, {age} days ago; check the provider's price page before you rely on it."


def _show(catalogue: Catalogue, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("type", "region", "GPUs", "CPU", "GiB", "USD/h", "as of"):
        table.add_column(heading, justify="right" if heading in ("CPU", "GiB", "USD/h") else "left", no_wrap=True)
    for each in catalogue.instance_types:
        gpus = f"{each.gpu_count} {each.gpu} {each.gpu_memory_gib:g}" if each.gpu else "-"
        numbers = (str(each.vcpu), f"{each.memory_gib:g}", f"{each.usd_per_hour:.4g}")
        table.add_row(each.type, each.region, gpus, *numbers, each.as_of.isoformat())
    console.print(table)
    for each in catalogue.instance_types:
        if each.refused:
            console.print(f"{each.type}: {each.refused}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        print("python -m perf.cost takes no arguments; it lists the known instance types", file=sys.stderr)
        return Exit.USAGE
    terminal = sys.stdout.isatty()
    _show(load(), Console(width=80, force_terminal=terminal, no_color=not terminal, highlight=False))
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
