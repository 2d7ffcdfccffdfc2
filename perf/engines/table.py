"""A comparison of engines as Markdown for docs/benchmarks.md: the values, the gaps and the conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from perf.engines.results import EngineComparison, Gap, Spread, Values
from perf.formatting import format_number

_HEAD = ("streams", "server", "tok/s", "TTFT ms, p50 / p95", "ITL ms, p50", "TPOT ms, p50")


def markdown(comparison: EngineComparison) -> str:
    parts = [_table(_HEAD, map(_row, comparison.values()))]
    if gaps := comparison.gaps():
        first = comparison.servers[0]
        head = ("streams", f"{first} against", "tok/s, ratio", "TTFT p50, ratio", "TTFT p50, difference in ms")
        parts.append(_table(head, map(_gap_row, gaps)))
    parts.append("\n".join(f"- {condition}" for condition in _conditions(comparison)))
    if cautions := comparison.cautions():
        parts.append("\n".join(f"- Caution: {caution}" for caution in cautions))
    return "\n\n".join(parts)


def _row(values: Values) -> Sequence[str]:
    ttft = f"{format_number(values.ttft_p50)} / {format_number(values.ttft_p95)}"
    latencies = (ttft, format_number(values.itl_p50), format_number(values.tpot_p50))
    return (str(values.streams), values.server, format_number(values.tokens_per_s), *latencies)


def _gap_row(gap: Gap) -> Sequence[str]:
    ratios = _spread(gap.throughput, ".3f"), _spread(gap.ttft_ratio, ".3f")
    return str(gap.streams), gap.server, *ratios, _spread(gap.ttft, "+.1f")


def _spread(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.low:{form}} to {spread.high:{form}})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def _conditions(comparison: EngineComparison) -> list[str]:
    chosen, machine = comparison.settings, comparison.machine
    gpus = ", ".join(machine.gpus) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    rounds = max((turn.round for turn in comparison.turns), default=0)
    kept = "all servers ran, and one at a time had requests" if chosen["keep"] else "one server at a time ran"
    conditions = [
        f"Machine: {machine.cores} cores of {machine.processor}, {machine.memory_gib:g} GiB; GPU: {gpus}; "
        f"{machine.system}. The client ran on the same machine.",
        f"Device: {chosen['device']}. Model: {chosen['model']}, {chosen['dtype']}, at most {chosen['max_context']} "
        f"tokens and {max(chosen['streams'])} sequences at a time, {chosen['kv_memory_gib']:g} GiB of KV cache, vLLM "
        f"{'eager' if chosen['eager'] else 'with compilation and CUDA graphs'}.",
        f"Load: prompts of {chosen['prompt_words']} random words, answers of {chosen['max_tokens']} tokens, greedy; "
        f"requests that began within {chosen['duration_s']:g} s.",
        f"Rounds: {rounds}, in turn; {kept}. Values are medians of the rounds, with the lowest and the highest in "
        "parentheses.",
        f"Start until the first answer: {_starts(comparison)}.",
        f"Versions: {versions}. Measured on {comparison.started_at[:10]} at commit {comparison.commit or 'unknown'}.",
    ]
    if comparison.idle_cpu:
        idle = ", ".join(f"{server} {share:.2f}" for server, share in comparison.idle_cpu.items())
        conditions.insert(5, f"Cores that a server used while no server had a request: {idle}.")
    return conditions


def _starts(comparison: EngineComparison) -> str:
    """The median of each server."""
    seconds: dict[str, list[float]] = {}
    for start in comparison.starts:
        seconds.setdefault(start.server, []).append(start.seconds)
    return ", ".join(f"{server} {median(values):.0f} s" for server, values in seconds.items())
