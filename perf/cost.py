"""What a measured throughput costs on a machine of the catalogue; `python -m perf.cost` lists them."""

from __future__ import annotations

import datetime
import difflib
import sys
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from perf.exits import Exit
from perf.results import Cost, Run, Stage

STALE_DAYS = 180

Positive: TypeAlias = Annotated[float, Field(gt=0)]


class CostError(ValueError):
    """No price can be told; the sentence says why and what would help."""


class UnknownInstanceType(CostError):
    pass


class InstanceType(BaseModel):
    """On demand, Linux, in USD; disks, addresses and traffic excluded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Literal["aws", "gcp", "azure"]
    type: str
    region: str
    gpu: str | None = None
    gpu_count: int = Field(default=0, ge=0)
    gpu_memory_gib: Positive | None = Field(default=None, description="Of one GPU.")
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    vcpu: int = Field(gt=0)
    memory_gib: Positive
    usd_per_hour: Positive
    as_of: datetime.date
    source: str = Field(min_length=1)
    spot_usd_per_hour: Positive | None = None
    spot_as_of: datetime.date | None = None
    spot_source: str | None = Field(default=None, min_length=1)
    note: str | None = None
    refused: str | None = Field(default=None, description="Why this service does not run there as it is.")

    @model_validator(mode="after")
    def _gpus_are_whole(self) -> Self:
        told = [
            self.gpu is not None,
            self.gpu_count > 0,
            self.gpu_memory_gib is not None,
            bool(self.compute_capability),
        ]
        if any(told) != all(told):
            raise ValueError(f"{self.name}: gpu, gpu_count, gpu_memory_gib and compute_capability go together")
        return self

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.region}:{self.type}"

    def is_called(self, name: str) -> bool:
        """`g5.xlarge`, `aws:g5.xlarge` or `aws:us-west-2:g5.xlarge`."""
        return name.lower() in {f"{self.provider}:{self.type}".lower(), self.type.lower(), self.name.lower()}


class Catalogue(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    instance_types: tuple[InstanceType, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [each.name for each in self.instance_types]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"twice in the catalogue: {', '.join(twice)}")
        return self

    def find(self, name: str) -> InstanceType:
        """Raises CostError."""
        found = [each for each in self.instance_types if each.is_called(name)]
        if not found:
            raise UnknownInstanceType(f"no instance type {name!r} is known{self._close_to(name)}; {_LISTING}")
        if len(found) > 1:
            raise CostError(f"{name!r} is one of several: {', '.join(each.name for each in found)}; write one of these")
        return found[0]

    def _close_to(self, name: str) -> str:
        types = {each.type.lower(): each.type for each in self.instance_types}
        close = difflib.get_close_matches(name.rpartition(":")[2].lower(), types, n=3)
        return f"; did you mean {' or '.join(types[each] for each in close)}?" if close else ""


_LISTING = "`python -m perf.cost` lists all that are known"


def load(path: Path | None = None) -> Catalogue:
    """The shipped one, or another file of its shape. Raises CostError."""
    return _read(path) if path else _shipped()


@cache
def _shipped() -> Catalogue:
    return _parse(resources.files("infra_pulumi").joinpath("catalogue.yaml").read_text(), "catalogue.yaml")


def _read(path: Path) -> Catalogue:
    try:
        return _parse(path.read_text(), str(path))
    except OSError as error:
        raise CostError(f"{path}: {error.strerror}") from None


def _parse(text: str, name: str) -> Catalogue:
    try:
        return Catalogue.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise CostError(f"{name} is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CostError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def cost(instance_type: str, run: Run, catalogue: Catalogue | None = None) -> Cost:
    """Of the stage with the most tokens a second, of those that met the run's SLO if it had one. Raises CostError."""
    return stage_cost(instance_type, best_stage(run), catalogue)


def stage_cost(instance_type: str, stage: Stage, catalogue: Catalogue | None = None) -> Cost:
    """Raises CostError."""
    machine = (catalogue or load()).find(instance_type)
    name = f"{stage.scenario}, {stage.name}"
    if not (stage.tokens_per_s > 0 and stage.requests_per_s > 0):
        raise CostError(f"{name} finished nothing, so it has no price")
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
    """Raises CostError."""
    stages = [stage for stage in run.stages if not stage.client.limited]
    if run.slo is not None:  # a stage of which it says nothing, such as of the first token of a batch, did not meet it
        stages = [stage for stage in stages if stage.goodput is not None and not stage.missed]
        if run.stages and not stages:
            raise CostError(f"no stage met {run.slo}, so there is no throughput to put a price on")
    if not stages:
        raise CostError("the run has no stage to put a price on")
    return max(stages, key=lambda stage: stage.tokens_per_s)


def stale(as_of: str, today: datetime.date) -> str | None:
    """A sentence about an old price."""
    age = (today - datetime.date.fromisoformat(as_of)).days
    if age <= STALE_DAYS:
        return None
    return f"The price is of {as_of}, {age} days ago; look at the provider's page before you rely on it."


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
        print("python -m perf.cost takes no arguments; it lists the instance types that are known", file=sys.stderr)
        return Exit.USAGE
    terminal = sys.stdout.isatty()
    _show(load(), Console(width=80, force_terminal=terminal, no_color=not terminal, highlight=False))
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
