"""Formats plans, costs and machines as text tables, and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infra_pulumi.catalogue import InstanceType
from infra_pulumi.cold_start import Phase, total, total_again
from infra_pulumi.cost import Estimate
from infra_pulumi.model_sizing import Fit
from infra_pulumi.sizing_facts import Load
from infra_pulumi.spec import ClusterSpec

if TYPE_CHECKING:  # these modules import Pulumi, which `cost` and `catalogue` do not need
    from infra_pulumi.policy import Finding
    from infra_pulumi.record import Recording


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """A text table. Columns are as wide as their widest cell; the columns in `right` are right-aligned."""
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
    """Every resource in creation order, with its dependencies. Providers are left out: all resources depend on one."""
    providers = {each.name for each in recording.resources if each.type.startswith("pulumi:providers:")}
    rows = [
        (
            str(number),
            resource.kind,
            resource.name,
            "protected" if resource.protect else "",
            _shorten([name for name in resource.dependencies if name not in providers]),
        )
        for number, resource in enumerate(recording.resources, 1)
    ]
    return table(("", "kind", "name", "", "depends on"), rows, frozenset({0}))


def _shorten(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def findings(found: Sequence[Finding]) -> str:
    if not found:
        return "the policy has no findings"
    return "\n".join(f"{each.severity} {each.rule}: {each.resource}: {each.message}; {each.remedy}" for each in found)


def cost(estimate: Estimate, budget: float | None) -> str:
    rows = [
        (line.what, *(f"{usd:,.2f}" for usd in (line.idle, line.expected, line.maximum)), str(line.as_of), line.assumed)
        for line in estimate.lines
    ]
    sums = (estimate.idle, estimate.expected, estimate.maximum)
    rows.append(("total", *(f"{usd:,.2f}" for usd in sums), "", ""))
    text = table(("USD per month", "idle", "expected", "maximum", "price date", ""), rows, frozenset({1, 2, 3}))
    text += f"\n`expected` assumes that all nodes run {estimate.busy_share:.0%} of the time. "
    text += "Traffic, logs and support are not included."
    if budget is not None and estimate.maximum > budget:
        over = "expected" if estimate.expected > budget else "maximum"
        text += f"\nThe {over} cost is above the budget of {budget:,.2f} USD. A budget sends alerts; it stops nothing."
    return text


def cold_start(phases: tuple[Phase, ...], source: str) -> str:
    rows = [(phase.name, f"{phase.seconds:.0f}", f"{phase.again:.0f}" if phase.again else "-") for phase in phases]
    rows.append(("total", f"{total(phases):.0f}", f"{total_again(phases):.0f}"))
    headings = ("start of a replica, seconds", "on a new node", "on the same node again")
    return table(headings, rows, frozenset({1, 2})) + f"\n{source}"


def machines(types: Iterable[InstanceType]) -> str:
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
        for each in types
    ]
    headings = ("cloud", "type", "GPUs", "cc", "vCPU", "GiB", "USD/h", "spot", "price date", "")
    return table(headings, rows, frozenset({4, 5, 6, 7}))


def fits(found: Sequence[Fit]) -> str:
    vllm = any(fit.kv_tokens is not None for fit in found)
    rows = [
        (
            fit.machine.provider,
            fit.machine.type,
            f"{fit.replicas} x {fit.gpus_per_replica} GPU",
            f"{fit.required_gib:.1f}",
            *((f"{fit.kv_tokens:,}", str(fit.sequences)) if vllm else ()),
            f"{fit.tokens_per_s:,.0f}",
            fit.throughput,
            f"{fit.usd_per_million_tokens:.3f}",
            "-" if fit.spot_usd_per_million_tokens is None else f"{fit.spot_usd_per_million_tokens:.3f}",
            str(fit.machine.as_of),
        )
        for fit in found
    ]
    of_vllm = ("KV tokens", "sequences") if vllm else ()
    headings = (
        *("cloud", "type", "replicas", "GiB each"),
        *of_vllm,
        *("tokens/s", "", "USD/M tokens", "spot", "price date"),
    )
    texts = {"cloud", "type", "replicas", "", "price date"}
    return table(headings, rows, frozenset(n for n, heading in enumerate(headings) if heading not in texts))


def about_fits(load: Load, vllm: bool) -> str:
    """What the columns of `fits` mean."""
    meaning = (
        f"The KV cache of each replica holds `KV tokens`: the most are `sequences` of {load.context} tokens at a time."
        if vllm
        else f"Each replica decodes {load.streams} streams of {load.context} tokens at the same time."
    )
    return (
        f"{meaning} A `derived`\nthroughput comes from the GPU's memory bandwidth and arithmetic; use it only to rank "
        "machines. To\nreplace it, measure with python -m perf.suite and pass --measured TYPE=TOKENS_PER_S."
    )


def summary(spec: ClusterSpec) -> str:
    """The cluster in one line: name, cloud, region, zones and node groups."""
    pools = [
        f"{group.name} {group.min} to {group.max} x {' or '.join(group.pool.instance_types)}"
        + (", spot" if group.spot else "")
        for group in spec.node_groups()
    ]
    return f"{spec.name} on {spec.provider}, {spec.region} ({', '.join(spec.zones)}): {'; '.join(pools)}"


def estimate_data(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON values."""
    sums = {"idle": estimate.idle, "expected": estimate.expected, "maximum": estimate.maximum}
    lines = [{**asdict(line), "as_of": line.as_of.isoformat()} for line in estimate.lines]
    return {
        "busy_share": estimate.busy_share,
        "usd_per_month": {name: round(usd, 2) for name, usd in sums.items()},
        "lines": lines,
    }


def fit_data(fit: Fit) -> dict[str, Any]:
    """A fit as JSON values."""
    return {**asdict(fit), "machine": fit.machine.model_dump(mode="json")}


def bullets(sentences: Iterable[str]) -> Iterator[str]:
    """Each sentence as an indented line."""
    return (f"  {sentence}" for sentence in sentences)
