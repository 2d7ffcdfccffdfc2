"""Plans, costs and machines as text for people, and as plain data for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infra_pulumi.catalogue import InstanceType
from infra_pulumi.coldstart import Phase, total
from infra_pulumi.cost import Estimate
from infra_pulumi.sizing import Fit
from infra_pulumi.spec import ClusterSpec

if TYPE_CHECKING:  # they need Pulumi, which a list of prices does not
    from infra_pulumi.policy import Finding
    from infra_pulumi.record import Recording


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Columns as wide as what is in them; those in `right` end at the same place."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def tree(recording: Recording) -> str:
    """Every resource in its order, with what it waits for, apart from the provider, which all do."""
    providers = {each.name for each in recording.resources if each.type.startswith("pulumi:providers:")}
    rows = [
        (
            str(number),
            resource.kind,
            resource.name,
            "protected" if resource.protect else "",
            _after([name for name in resource.dependencies if name not in providers]),
        )
        for number, resource in enumerate(recording.resources, 1)
    ]
    return table(("", "kind", "name", "", "after"), rows, frozenset({0}))


def _after(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def findings(found: Sequence[Finding]) -> str:
    if not found:
        return "nothing is wrong with it"
    return "\n".join(f"{each.severity} {each.rule}: {each.resource}: {each.message}; {each.remedy}" for each in found)


def cost(estimate: Estimate, budget: float | None) -> str:
    rows = [
        (line.what, *(f"{usd:,.2f}" for usd in (line.idle, line.expected, line.maximum)), str(line.as_of), line.assumed)
        for line in estimate.lines
    ]
    sums = (estimate.idle, estimate.expected, estimate.maximum)
    rows.append(("together", *(f"{usd:,.2f}" for usd in sums), "", ""))
    text = table(("USD a month", "idle", "expected", "maximum", "price of", ""), rows, frozenset({1, 2, 3}))
    text += f"\nexpected: all nodes are there {estimate.busy_share:.0%} of the time. "
    text += "Traffic, logs and support are not in it."
    if budget is not None and estimate.maximum > budget:
        over = "expected" if estimate.expected > budget else "maximum"
        text += f"\nThe {over} cost is above the budget of {budget:,.2f} USD. The budget tells; it stops nothing."
    return text


def cold_start(phases: tuple[Phase, ...], caveat: str) -> str:
    rows = [(phase.name, f"{phase.seconds:.0f}") for phase in phases]
    rows.append(("together", f"{total(phases):.0f}"))
    return table(("from no GPU node to an answer", "seconds"), rows, frozenset({1})) + f"\n{caveat}"


def machines(known: Iterable[InstanceType]) -> str:
    rows = [
        (
            each.provider,
            each.type,
            f"{each.gpu_count} x {each.gpu} {each.gpu_memory_gib:g} GiB" if each.gpu else "-",
            each.compute_capability or "-",
            str(each.vcpu),
            f"{each.memory_gib:g}",
            f"{each.usd_per_hour:.3f}",
            "-" if each.spot_usd_per_hour is None else f"{each.spot_usd_per_hour:.3f}",
            str(each.as_of),
            "refused" if each.refused else "",
        )
        for each in known
    ]
    headings = ("cloud", "type", "GPUs", "cc", "vCPU", "GiB", "USD/h", "spot", "price of", "")
    return table(headings, rows, frozenset({4, 5, 6, 7}))


def fits(found: Iterable[Fit]) -> str:
    rows = [
        (
            fit.machine.provider,
            fit.machine.type,
            f"{fit.replicas} x {fit.gpus_per_replica} GPU",
            f"{fit.needed_gib:.1f}",
            f"{fit.tokens_per_s:,.0f}",
            fit.throughput,
            f"{fit.usd_per_million_tokens:.3f}",
            "-" if fit.spot_usd_per_million_tokens is None else f"{fit.spot_usd_per_million_tokens:.3f}",
            str(fit.machine.as_of),
        )
        for fit in found
    ]
    headings = ("cloud", "type", "replicas", "GiB each", "tokens/s", "", "USD/M tokens", "spot", "price of")
    return table(headings, rows, frozenset({3, 4, 6, 7}))


def summary(spec: ClusterSpec) -> str:
    pools = [
        f"{group.name} {group.min} to {group.max} x {' or '.join(group.pool.instance_types)}"
        + (", spot" if group.spot else "")
        for group in spec.node_groups()
    ]
    return f"{spec.name} on {spec.provider}, {spec.region} ({', '.join(spec.zones)}): {'; '.join(pools)}"


def plain_estimate(estimate: Estimate) -> dict[str, Any]:
    sums = {"idle": estimate.idle, "expected": estimate.expected, "maximum": estimate.maximum}
    lines = [{**asdict(line), "as_of": line.as_of.isoformat()} for line in estimate.lines]
    return {
        "busy_share": estimate.busy_share,
        "usd_per_month": {name: round(usd, 2) for name, usd in sums.items()},
        "lines": lines,
    }


def plain_fit(fit: Fit) -> dict[str, Any]:
    return {**asdict(fit), "machine": fit.machine.model_dump(mode="json")}


def bullets(sentences: Iterable[str]) -> Iterator[str]:
    return (f"  {sentence}" for sentence in sentences)
