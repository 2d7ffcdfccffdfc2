"""Loads the catalogue of machines and prices, and checks a cluster description against it."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Self, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infra_pulumi.spec import ClusterSpec, Fault, GpuPool, Provider, SpecError

STALE_DAYS = 180

Positive: TypeAlias = Annotated[float, Field(gt=0)]


# Families of machines with GPUs that are left out, by provider.
_UNUSABLE = {
    "aws": {
        "g5g": "its processor is ARM, and the images of the service are for x86",
        "g4ad": "its GPUs are from AMD, and the images of the service have CUDA",
    }
}


class CatalogueError(Exception):
    """The catalogue file is invalid, or has no such machine. The message states a remedy."""


class InstanceType(BaseModel):
    """One machine type with its Linux prices in USD, without disks, addresses and traffic. Spot prices have a date."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Provider
    type: str
    region: str
    gpu: str | None = None
    gpu_count: int = Field(0, ge=0)
    gpu_memory_gib: Positive | None = Field(None, description="Memory of one GPU.")
    compute_capability: str | None = Field(None, pattern=r"^\d+\.\d+$")
    vcpu: int = Field(gt=0)
    memory_gib: Positive
    usd_per_hour: Positive
    as_of: datetime.date
    source: str = Field(min_length=1)
    spot_usd_per_hour: Positive | None = None
    spot_as_of: datetime.date | None = None
    spot_source: str | None = Field(None, min_length=1)
    zones: tuple[str, ...] = Field((), description="Zones of `region` that offer it; empty: all.")
    note: str | None = None
    refused: str | None = Field(None, description="Why the service does not run on this machine.")

    @model_validator(mode="after")
    def _complete_groups(self) -> Self:
        gpu = [self.gpu is not None, self.gpu_count > 0, self.gpu_memory_gib is not None, bool(self.compute_capability)]
        if any(gpu) != all(gpu):
            raise ValueError(f"{self.name}: gpu, gpu_count, gpu_memory_gib and compute_capability must be set together")
        spot = [self.spot_usd_per_hour is not None, self.spot_as_of is not None, self.spot_source is not None]
        if any(spot) != all(spot):
            raise ValueError(f"{self.name}: spot_usd_per_hour, spot_as_of and spot_source must be set together")
        return self

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.region}:{self.type}"

    def available_zones(self, zones: tuple[str, ...]) -> tuple[str, ...]:
        """The members of `zones` that offer this machine. Zones of a region without data count as offering it."""
        return tuple(zone for zone in zones if not (self.zones and zone.startswith(self.region)) or zone in self.zones)

    def price(self, spot: bool) -> float:
        """USD per hour. Without a known spot price this is the on-demand price."""
        return self.spot_usd_per_hour if spot and self.spot_usd_per_hour is not None else self.usd_per_hour


class Catalogue(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    instance_types: tuple[InstanceType, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [each.name for each in self.instance_types]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"duplicate machines in the catalogue: {', '.join(duplicates)}")
        return self

    def find(self, provider: str, instance_type: str) -> InstanceType | None:
        """The first machine of this type, or None. Its `region` is the region of the price, not of a cluster."""
        return next(
            (each for each in self.instance_types if (each.provider, each.type) == (provider, instance_type)), None
        )

    def get(self, provider: str, instance_type: str) -> InstanceType:
        """The machine of this type. Raises CatalogueError if it is unknown."""
        found = self.find(provider, instance_type)
        if found is None:
            raise CatalogueError(self.unknown(provider, instance_type))
        return found

    def zones(self, spec: ClusterSpec, pool: GpuPool) -> tuple[str, ...]:
        """The zones of a pool: its own, or the cluster's zones that offer its machine. Raises CatalogueError."""
        return pool.zones or self.get(spec.provider, pool.instance_types[0]).available_zones(spec.zones)

    def unknown(self, provider: str, instance_type: str) -> str:
        """A sentence about an unknown machine, with the reason if it cannot run the service, or with similar names."""
        reason = _UNUSABLE.get(provider, {}).get(instance_type.partition(".")[0])
        if reason:
            return f"{instance_type} cannot run the service: {reason}; `python -m infra_pulumi catalogue` lists others"
        known = {each.type.lower(): each.type for each in self.instance_types if each.provider == provider}
        close = [known[name] for name in difflib.get_close_matches(instance_type.lower(), known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(close)}?" if close else "`python -m infra_pulumi catalogue` lists them"
        return f"unknown machine {instance_type!r} of {provider}; {hint}"


def load(path: Path | None = None) -> Catalogue:
    """Load the shipped catalogue, or another file with the same schema. Raises CatalogueError."""
    return _read(path) if path else _shipped()


@cache
def _shipped() -> Catalogue:
    return _parse(resources.files("infra_pulumi").joinpath("catalogue.yaml").read_text(), "catalogue.yaml")


def _read(path: Path) -> Catalogue:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from None


def _parse(text: str, name: str) -> Catalogue:
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast; not every build of PyYAML has it
        return Catalogue.model_validate(yaml.load(text, loader))  # noqa: S506 (a safe one)
    except yaml.YAMLError as error:
        raise CatalogueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise CatalogueError("\n".join([f"{name} is invalid:", *faults])) from None


def check(spec: ClusterSpec, catalogue: Catalogue) -> None:
    """Check that a description's machines are known, have GPUs and can run the service. Raises SpecError."""
    faults = [*_system_faults(spec, catalogue), *_pool_faults(spec, catalogue)]
    if faults:
        raise SpecError(faults)


def _system_faults(spec: ClusterSpec, catalogue: Catalogue) -> Iterator[Fault]:
    name = str(spec.system.instance_type)
    machine = catalogue.find(spec.provider, name)
    if machine is None:
        yield Fault("system.instance_type", catalogue.unknown(spec.provider, name))
    elif machine.gpu:
        yield Fault("system.instance_type", f"{name} has a GPU, which the system pool does not use; take a CPU machine")


def _pool_faults(spec: ClusterSpec, catalogue: Catalogue) -> Iterator[Fault]:
    for index, pool in enumerate(spec.gpu_pools):
        machines = []
        for place, name in enumerate(pool.instance_types):
            path = f"gpu_pools.{index}.instance_types.{place}"
            machine = catalogue.find(spec.provider, name)
            if machine is None:
                yield Fault(path, catalogue.unknown(spec.provider, name))
                continue
            machines.append(machine)
            zones = pool.zones or spec.zones
            if (missing := set(pool.zones) - set(offered := machine.available_zones(zones))) or not offered:
                without = ", ".join(sorted(missing or set(zones)))
                yield Fault(
                    path, f"{name} is not available in {without}; it is available in {', '.join(machine.zones)}"
                )
            if not machine.gpu:
                yield Fault(path, f"{name} has no GPU; use CPU machines in the system pool")
            elif machine.refused and not spec.allow_refused:
                yield Fault(path, f"{name} is refused: {machine.refused}; or set allow_refused: true")
        if len({(machine.gpu, machine.gpu_count, machine.gpu_memory_gib) for machine in machines}) > 1:
            yield Fault(
                f"gpu_pools.{index}.instance_types",
                "these types have different GPUs, but a pool needs equal nodes; define a pool for each",
            )


def warnings(spec: ClusterSpec, catalogue: Catalogue, today: datetime.date) -> Iterator[str]:
    """Sentences about prices that are old, unknown or from another region, and about each machine's notes."""
    names = {str(spec.system.instance_type): False}
    for pool in spec.gpu_pools:
        names |= dict.fromkeys(pool.instance_types, pool.spot)
    for name, spot in names.items():
        machine = catalogue.get(spec.provider, name)
        if machine.refused:
            yield f"{name} is allowed by allow_refused, although {machine.refused}."
        if machine.note:
            yield f"{name}: {machine.note}."
        if (today - machine.as_of).days > STALE_DAYS:
            yield f"The price of {name} dates from {machine.as_of}; check the provider's page."
        if machine.region != spec.region:
            yield f"The price of {name} is from {machine.region}; {spec.region} may differ, or not offer it."
        if spot and machine.spot_usd_per_hour is None:
            yield f"The spot price of {name} is unknown; the on-demand price is used instead."
        elif spot and machine.spot_as_of and (today - machine.spot_as_of).days > STALE_DAYS:
            yield f"The spot price of {name} dates from {machine.spot_as_of}; spot prices change every day."
