"""Exports a run as Markdown, CSV and JUnit, and writes all its files."""

from __future__ import annotations

import csv as csv_writer
import io
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from perf import stages
from perf.formatting import clean, format_number, format_percent
from perf.html_report import render
from perf.results import Distribution, Run, Stage
from perf.slo import Slo

Cell = str | int | float | None
Column = tuple[str, str, Callable[[Run, Stage], Cell]]


def markdown(run: Run) -> str:
    """Tables of all stages, with machine, commit and command line."""
    parts = [_conditions(run)]
    parts += [f"**{group.heading}** ({group.loop} loop)\n\n{_table(group.stages)}" for group in stages.groups(run)]
    parts.append("Latencies are p50 / p95 and count from the time at which a request was due.")
    if run.cost is not None:
        parts.append(_cost(run))
    parts.append("\n".join(_escaped(sentence) for sentence in run.verdict.sentences))
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(run: Run) -> str:
    machine, target = run.machine, run.target
    hardware = [machine.processor, f"{machine.cores} cores", f"{format_number(machine.memory_gib)} GiB", *machine.gpus]
    where = "client and server on this machine" if target.on_this_machine else "the client's machine"
    lines = [
        f"Model: {_escaped(target.model or 'the server’s default')}; server: {_escaped(target.server)}",
        f"Machine ({where}): {_escaped(', '.join([*hardware, machine.system]))}",
        f"Measured {_escaped(run.started_at)}, commit {_escaped(run.commit or 'unknown')}"
        + (f", objective {_escaped(run.slo)}" if run.slo else ""),
    ]
    limited = [_escaped(f"{stage.scenario}, {stage.name}") for stage in stages.limited(run)]
    lines += [f"Skipped: {_escaped(f'{scenario}: {why}')}" for scenario, why in run.skipped.items()]
    if limited:
        lines.append(f"**Client-limited, these metrics describe the client and not the server:** {'; '.join(limited)}")
    return "  \n".join(lines) + "\n\n" + _code(shlex.join(run.command))


def _table(rows: Sequence[Stage]) -> str:
    """Times are p50 / p95; columns without any value are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("Load", [_escaped(stage.name) for stage in rows]),
        ("Requests", [format_number(stage.requests) for stage in rows]),
        ("Failed", [format_number(stage.failed) for stage in rows]),
        ("TTFT, ms", [_pair(stage.ttft_ms) for stage in rows]),
        ("TPOT, ms", [_pair(stage.tpot_ms) for stage in rows]),
        ("End to end, ms", [_pair(stage.e2e_ms) for stage in rows]),
        ("Tokens/s", [format_number(stage.tokens_per_s) for stage in rows]),
        ("Requests/s", [format_number(stage.requests_per_s) for stage in rows]),
        ("Efficiency", [stages.efficiency(stage) for stage in rows]),
        ("Goodput", [format_percent(stage.goodput.share if stage.goodput else None) for stage in rows]),
    ]
    columns = [(head, cells) for head, cells in columns if any(cell != "–" for cell in cells)]
    heads, cells = zip(*columns, strict=True)
    lines = [heads, ("---", *["---:"] * (len(heads) - 1)), *zip(*cells, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(times: Distribution | None) -> str:
    return "–" if times is None else f"{format_number(times.p50)} / {format_number(times.p95)}"


def _cost(run: Run) -> str:
    cost = run.cost
    assert cost is not None
    return (
        f"On {_escaped(cost.instance_type)} ({_escaped(cost.provider)}, ${format_number(cost.usd_per_hour)}/h, "
        f"{_escaped(cost.as_of)}): ${format_number(cost.usd_per_million_output_tokens)} per million output tokens, "
        f"${format_number(cost.usd_per_thousand_requests)} per thousand requests, at {_escaped(cost.stage)}."
    )


def _escaped(text: str) -> str:
    """One line of Markdown that shows the text literally."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(clean(text).split()))


def _code(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{clean(text)}\n{fence}"


def _nested(tree: str, name: str) -> Callable[[Run, Stage], Cell]:
    """Reads a value of a part of the stage that may be None."""

    def read(run: Run, stage: Stage) -> Cell:
        value: Cell = getattr(getattr(stage, tree), name, None)
        return value

    return read


def _times(metric: str, meaning: str) -> list[Column]:
    """The columns of a distribution."""

    labels = {"min": "minimum", "max": "maximum"}
    parts = ("count", "mean", "min", "p50", "p90", "p95", "p99", "max")
    return [
        (
            f"{metric}_count" if part == "count" else f"{metric}_{part}_ms",
            f"{meaning}: count" if part == "count" else f"{meaning}, ms: {labels.get(part, part)}",
            _nested(f"{metric}_ms", part),
        )
        for part in parts
    ]


# Name, meaning and reader of each CSV column.
COLUMNS: list[Column] = [
    ("started_at", "Start of the run, UTC", lambda run, stage: run.started_at),
    ("commit", "Commit of the suite's working copy", lambda run, stage: run.commit),
    ("url", "URL of the server", lambda run, stage: run.target.url),
    ("model", "Model name in the requests", lambda run, stage: run.target.model),
    ("scenario", "Kind of load", lambda run, stage: stage.scenario),
    ("stage", "Load level; scenario and stage together identify a row", lambda run, stage: stage.name),
    (
        "loop",
        "open: sent on a schedule; closed: each stream sends after its response",
        lambda run, stage: stage.load.loop,
    ),
    ("arrival", "Arrival process of the schedule", lambda run, stage: stage.load.arrival),
    ("rate", "Requests due per second, of open loops", lambda run, stage: stage.load.rate),
    ("concurrency", "Concurrent streams, of closed loops", lambda run, stage: stage.load.concurrency),
    ("batch_size", "Prompts per request", lambda run, stage: stage.load.batch_size),
    ("streaming", "1: streaming; 0: not", lambda run, stage: int(stage.load.streaming)),
    ("repeats", "Number of measured windows", lambda run, stage: stage.repeats),
    ("warmup_requests", "Requests of the warm-up, not measured", lambda run, stage: stage.warmup_requests),
    (
        "steady",
        "1: latency was steady at the end of the warm-up",
        lambda run, stage: "" if stage.steady is None else int(stage.steady),
    ),
    ("window_s", "Measured seconds, sum over all repeats", lambda run, stage: stage.window_s),
    ("requests", "Requests due in the window", lambda run, stage: stage.requests),
    ("finished", "Requests that finished", lambda run, stage: stage.finished),
    ("failed", "Requests that failed", lambda run, stage: stage.failed),
    ("errors", "Failures by kind with counts, separated by semicolons", lambda run, stage: _kinds(stage)),
    ("tokens", "Tokens of the finished responses", lambda run, stage: stage.tokens),
    ("prompt_tokens", "Tokens of their prompts", lambda run, stage: stage.prompt_tokens),
    ("tokens_per_s", "Tokens that arrived per second", lambda run, stage: stage.tokens_per_s),
    ("requests_per_s", "Requests that finished per second", lambda run, stage: stage.requests_per_s),
    ("tokens_per_chunk", "Tokens per chunk of a stream", lambda run, stage: stage.tokens_per_chunk),
    *_times("ttft", "From due to first token"),
    *_times("ttft_service", "From sent to first token"),
    *_times("tpot", "Time per token after the first, by request"),
    *_times("itl", "Gap between two chunks of a stream"),
    *_times("e2e", "From due to the end of the response"),
    *_times("e2e_service", "From sent to the end of the response"),
    (
        "efficiency",
        "Throughput relative to the lowest level, per stream or per batch",
        lambda run, stage: stage.efficiency,
    ),
    ("goodput_slo", "Objective of the goodput", _nested("goodput", "slo")),
    (
        "goodput_requests_per_s",
        "Requests per second that met the objective",
        _nested("goodput", "requests_per_s"),
    ),
    ("goodput_share", "Share of requests that met the objective", _nested("goodput", "share")),
    ("client_cpu", "Share of one core that the client used", lambda run, stage: stage.client.cpu),
    ("schedule_delay_p50_ms", "From due to sent, ms: p50", lambda run, stage: stage.client.schedule_delay_p50_ms),
    ("schedule_delay_p99_ms", "From due to sent, ms: p99", lambda run, stage: stage.client.schedule_delay_p99_ms),
    ("loop_lag_p99_ms", "Lateness of the client's timers, ms: p99", lambda run, stage: stage.client.loop_lag_p99_ms),
    ("achieved_rate", "Sent rate over requested rate", lambda run, stage: stage.client.achieved_rate),
    (
        "client_limited",
        "Why the metrics describe the client; empty: they describe the server",
        lambda run, stage: _limits(stage),
    ),
    ("cpu_percent", "Processor use of the client's machine", _nested("resources", "cpu_percent")),
    ("memory_mib", "Maximum memory use of the client's machine", _nested("resources", "memory_mib")),
    ("gpu_percent", "GPU use of the client's machine", _nested("resources", "gpu_percent")),
    (
        "gpu_memory_mib",
        "Maximum GPU memory use of the client's machine",
        _nested("resources", "gpu_memory_mib"),
    ),
]


def csv(run: Run) -> str:
    """One row per stage with the columns of COLUMNS; values are not rounded."""
    out = io.StringIO()
    writer = csv_writer.writer(out, lineterminator="\n")
    writer.writerow([name for name, _, _ in COLUMNS])
    writer.writerows([[_cell(read(run, stage)) for _, _, read in COLUMNS] for stage in run.stages])
    return out.getvalue()


def _cell(value: Cell) -> Cell:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front, as OWASP recommends."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _kinds(stage: Stage) -> str:
    return "; ".join(f"{kind}: {count}" for kind, count in stage.errors.items())


def _limits(stage: Stage) -> str:
    return "; ".join(stage.client.limited)


def junit(run: Run) -> str:
    """One test suite per scenario and one for the verdict; each test case is a condition that must hold."""
    root = ET.Element("testsuites", name="perf.suite", time=f"{run.seconds:.3f}")
    slo = stages.objective(run)
    for group in stages.groups(run):
        _suite(
            root, f"{group.scenario}, {group.loop} loop", [case for one in group.stages for case in _cases(one, slo)]
        )
    for scenario, why in run.skipped.items():
        _suite(root, scenario, [_case(f"perf.{scenario}", "all stages", skipped=why)])
    reasons = [_case("verdict", reason, failure=reason) for reason in run.verdict.reasons]
    passed = [_case("verdict", " ".join(run.verdict.sentences) or "the run")]
    if run.verdict.exit_code:
        passed = [] if reasons else [_case("verdict", "exit code", failure=f"exit code {run.verdict.exit_code}")]
    _suite(root, "verdict", reasons or passed)
    for count in ("tests", "failures", "skipped"):
        root.set(count, str(sum(int(suite.get(count, 0)) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, name: str, cases: Sequence[ET.Element]) -> None:
    counts = {kind: str(sum(case.find(tag) is not None for case in cases)) for kind, tag in _OUTCOMES.items()}
    seconds = sum(float(case.get("time", 0)) for case in cases)
    attributes = {"name": name, "tests": str(len(cases)), "errors": "0", "time": f"{seconds:.3f}", **counts}
    suite = ET.SubElement(root, "testsuite", attributes)
    suite.extend(cases)


_OUTCOMES = {"failures": "failure", "skipped": "skipped"}


def _cases(stage: Stage, slo: Slo | None) -> list[ET.Element]:
    scenario, name = f"perf.{stage.scenario}", stage.name
    succeeded = _case(scenario, f"{name}: every request succeeds", seconds=stage.window_s, failure=_failure(stage))
    slow = "; ".join(stage.client.limited)
    kept_up = _case(scenario, f"{name}: the client keeps up", failure=f"client-limited: {slow}" if slow else None)
    return [succeeded, kept_up, *(_bound(scenario, name, check) for check in stages.checks(stage, slo))]


def _failure(stage: Stage) -> str | None:
    """None for a search, which may raise the load until requests fail."""
    failed = stage.failed
    if not failed or stage.scenario == "find-max":
        return None
    return f"{failed} of {stage.requests} requests failed: {_kinds(stage)}"


def _bound(scenario: str, name: str, check: stages.Check) -> ET.Element:
    skipped = None if check.measured else "not measured"
    return _case(scenario, f"{name}: {check.bound}", failure=check.missed, skipped=skipped)


def _case(
    scenario: str, name: str, seconds: float = 0.0, failure: str | None = None, skipped: str | None = None
) -> ET.Element:
    case = ET.Element("testcase", classname=scenario, name=clean(name), time=f"{seconds:.3f}")
    if failure is not None:
        ET.SubElement(case, "failure", message=clean(failure)).text = clean(failure)
    if skipped is not None:
        ET.SubElement(case, "skipped", message=clean(skipped))
    return case


def write_all(run: Run, output: Path) -> list[Path]:
    """Writes all formats into a folder, or next to a .json file with the same stem.

    Each file is replaced atomically: a concurrent reader never gets a partial file. Raises OSError.
    """
    if output.suffix == ".json":
        paths = [output, *(output.with_suffix(suffix) for suffix in (".html", ".md", ".csv", ".xml"))]
    else:
        paths = [output / name for name in ("results.json", "report.html", "report.md", "results.csv", "junit.xml")]
    texts = [run.model_dump_json(indent=1) + "\n", render(run), markdown(run), csv(run), junit(run)]
    folder_of(output).mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts, strict=True):
        write(path, text)
    return paths


def folder_of(output: Path) -> Path:
    return output.parent if output.suffix == ".json" else output


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
