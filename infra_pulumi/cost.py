"""What a cluster costs a month: idle, expected and at most. From list prices, without traffic, logs and support."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from infra_pulumi.catalogue import Catalogue
from infra_pulumi.spec import ClusterSpec

HOURS = 730  # of a month, as the clouds count it
BUSY_SHARE = 0.25  # of the time, what may be added is there: eight hours on working days


@dataclass(frozen=True, slots=True)
class Price:
    """`usd` for each `unit`; `as_of` is when the source was read, or when it says that the price held."""

    usd: float
    unit: str
    as_of: datetime.date
    source: str


_LISTED = datetime.date(2026, 9, 1)
_AWS_VPC = "AWS's VPC price page, us-east-1 and us-west-2, as of public tables of 2026"
_AWS_EBS = "AWS's EBS price page, us-east-1 and us-west-2, as of public tables of 2026"
_GCP = "Google's price pages, us-central1, as of public tables of 2026"
_AZURE = "Azure's price pages, eastus, as of public tables of 2026"

CONTROL_PLANE = {
    "aws": Price(0.10, "hour", _LISTED, "AWS's EKS price page: a cluster in standard support"),
    "gcp": Price(0.10, "hour", _LISTED, "Google's GKE price page: a regional cluster, before the free tier's credit"),
    "azure": Price(0.10, "hour", _LISTED, "Azure's AKS price page: the Standard tier"),
}
NAT = {
    "aws": Price(0.045, "hour", _LISTED, _AWS_VPC),
    "gcp": Price(0.0014, "hour and VM", _LISTED, _GCP),
    "azure": Price(0.045, "hour", _LISTED, _AZURE),
}
GCP_NAT_MOST = 0.044  # an hour, from 32 VMs on
ADDRESS = {
    "aws": Price(0.005, "hour", _LISTED, _AWS_VPC),
    "gcp": Price(0.005, "hour", _LISTED, _GCP),
    "azure": Price(0.005, "hour", _LISTED, _AZURE),
}
AWS_DISK = Price(0.08, "GiB and month", _LISTED, _AWS_EBS)
AWS_THROUGHPUT = Price(0.04, "MiB/s and month above 125", _LISTED, _AWS_EBS)
AWS_THROUGHPUT_ABOVE = 250 - 125  # what the launch template asks for
GCP_DISK = Price(0.10, "GiB and month", _LISTED, _GCP)
AZURE_DISKS = {  # premium disks come in sizes
    32: 5.28,
    64: 10.21,
    128: 19.71,
    256: 38.02,
    512: 73.22,
    1024: 135.17,
    2048: 259.05,
    4096: 495.57,
}
KEY = Price(1.0, "month", _LISTED, "AWS's KMS price page")


@dataclass(frozen=True, slots=True)
class Line:
    """USD a month. `assumed` says what the price rests on where it is not simply listed."""

    what: str
    idle: float
    expected: float
    maximum: float
    unit_usd: float
    unit: str
    as_of: datetime.date
    source: str
    assumed: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    lines: tuple[Line, ...]
    busy_share: float

    @property
    def idle(self) -> float:
        return sum(line.idle for line in self.lines)

    @property
    def expected(self) -> float:
        return sum(line.expected for line in self.lines)

    @property
    def maximum(self) -> float:
        return sum(line.maximum for line in self.lines)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """How many of one kind: always, on average, and at most."""

    idle: float
    expected: float
    maximum: float

    def __add__(self, other: _Nodes) -> _Nodes:
        return _Nodes(self.idle + other.idle, self.expected + other.expected, self.maximum + other.maximum)

    def line(self, what: str, monthly: float, price: Price, assumed: str = "") -> Line:
        amounts = (monthly * self.idle, monthly * self.expected, monthly * self.maximum)
        return Line(what, *amounts, price.usd, price.unit, price.as_of, price.source, assumed)


def estimate(spec: ClusterSpec, catalogue: Catalogue, busy_share: float = BUSY_SHARE) -> Estimate:
    """`busy_share` of the time all nodes above `min` are there. Raises CatalogueError for a machine without a price."""
    return Estimate(tuple(_lines(spec, catalogue, busy_share)), busy_share)


def _lines(spec: ClusterSpec, catalogue: Catalogue, busy_share: float) -> Iterator[Line]:
    once = _Nodes(1, 1, 1)
    yield once.line("control plane", CONTROL_PLANE[spec.provider].usd * HOURS, CONTROL_PLANE[spec.provider])
    if spec.provider == "aws":
        yield once.line("key for secrets", KEY.usd, KEY)
    # The system pool has its minimum all the time; what it may add is for upgrades and surprises.
    system = _Nodes(spec.system.min, spec.system.min, spec.system.max)
    everything = system
    yield from _node_lines(
        "system", system, str(spec.system.instance_type), False, spec.system.disk_gib, spec, catalogue
    )
    for group in spec.node_groups():
        nodes = _Nodes(group.min, group.min + (group.max - group.min) * busy_share, group.max)
        everything += nodes
        # Of several types the dearest, so that the maximum is one.
        names = group.pool.instance_types
        name = max(names, key=lambda each: catalogue.get(spec.provider, each).price(group.spot))
        yield from _node_lines(group.name, nodes, name, group.spot, group.pool.disk_gib, spec, catalogue)
    yield from _network_lines(spec, everything)


def _node_lines(
    name: str, nodes: _Nodes, instance_type: str, spot: bool, disk_gib: int, spec: ClusterSpec, catalogue: Catalogue
) -> Iterator[Line]:
    machine = catalogue.get(spec.provider, instance_type)
    known = spot and machine.spot_usd_per_hour is not None
    price = Price(
        machine.price(spot),
        "hour",
        machine.spot_as_of if known and machine.spot_as_of else machine.as_of,
        machine.spot_source if known and machine.spot_source else machine.source,
    )
    assumed = "no spot price is known: the price on demand" if spot and not known else ""
    kind = f"{instance_type}, spot" if spot else instance_type
    yield nodes.line(f"{name}: {kind}", price.usd * HOURS, price, assumed)
    monthly, disk = disk_price(spec.provider, disk_gib)
    yield nodes.line(f"{name}: disk of {disk_gib} GiB", monthly, disk)


def disk_price(provider: str, gib: int) -> tuple[float, Price]:
    """USD a month of one disk, and the price that it comes from."""
    match provider:
        case "aws":
            return gib * AWS_DISK.usd + AWS_THROUGHPUT_ABOVE * AWS_THROUGHPUT.usd, AWS_DISK
        case "gcp":
            return gib * GCP_DISK.usd, GCP_DISK
        case _:
            size = next(size for size in AZURE_DISKS if size >= gib)
            usd = AZURE_DISKS[size]
            return usd, Price(usd, f"month and {size} GiB", _LISTED, _AZURE)


def _network_lines(spec: ClusterSpec, nodes: _Nodes) -> Iterator[Line]:
    gateways = len(spec.zones) if spec.provider == "aws" and spec.network.nat == "per-zone" else 1
    count = _Nodes(gateways, gateways, gateways)
    nat, address = NAT[spec.provider], ADDRESS[spec.provider]
    if spec.provider == "gcp":
        hourly = _Nodes(*(min(each * nat.usd, GCP_NAT_MOST) for each in (nodes.idle, nodes.expected, nodes.maximum)))
        yield hourly.line("NAT", HOURS, nat, "without traffic")
    else:
        yield count.line("NAT", nat.usd * HOURS, nat, "without traffic")
    yield count.line("addresses of NAT", address.usd * HOURS, address)
