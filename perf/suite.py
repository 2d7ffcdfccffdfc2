"""`python -m perf.suite`: measures a service over HTTP, says what was found, and writes it down."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TextIO

from perf import cost, export, loop, machine, server
from perf.arrivals import TraceError
from perf.client import Client
from perf.comparison import FAIL_ON, ComparisonError, Row, compare
from perf.dialects import DIALECTS
from perf.exits import Exit
from perf.options import parser
from perf.progress import Progress
from perf.records import Record
from perf.results import ResultsError, Run, Target
from perf.scenarios import Bench
from perf.server import Unreachable
from perf.settings import Settings, settings
from perf.table import table
from perf.verdict import verdict
from perf.workload import Ask

TOOL = "serve_app perf.suite"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    asked = options.parse_args(arguments)
    command = ["python", "-m", "perf.suite", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        chosen = settings(asked, options.error)
        baseline = Run.read(asked.baseline) if asked.baseline is not None else None
        key = asked.api_key_file.read_text().strip() if asked.api_key_file is not None else None
        if key is not None and len(key.split()) != 1:
            options.error(f"{asked.api_key_file}: expected one line with the key")
        export.folder_of(asked.output).mkdir(parents=True, exist_ok=True)  # now rather than after an hour
        if chosen.instance_type is not None:
            cost.find(chosen.instance_type)
    except (ResultsError, TraceError, cost.CostError) as error:
        options.error(str(error))
    except UnicodeDecodeError:
        options.error("a file that was named is no text")
    except OSError as error:
        options.error(f"{error.filename}: {error.strerror}")
    try:
        run = loop.run(measure(chosen, command, key))
    except Unreachable as error:
        print(f"perf.suite: {error}", file=sys.stderr)
        return Exit.UNREACHABLE
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return Exit.INTERRUPTED
    if baseline is not None:
        run = against(baseline, run, FAIL_ON if asked.fail_on is None else asked.fail_on)
    if asked.json:
        print(run.model_dump_json(indent=1))
    out = sys.stderr if asked.json else sys.stdout
    show(run, out)
    try:
        written = export.write_all(run, asked.output)
    except OSError as error:  # what was measured has been said at least
        print(f"perf.suite: {error.filename}: {error.strerror}; give another --output", file=sys.stderr)
        return Exit.USAGE
    print(f"\n{' '.join(map(str, written))}", file=out)
    return run.verdict.exit_code


async def measure(chosen: Settings, command: list[str], key: str | None) -> Run:
    """Raises Unreachable."""
    started, began = datetime.now(UTC), time.monotonic()
    client = Client(chosen.url, DIALECTS[chosen.api](chosen.model, chosen.fixed_length), chosen.timeout_s, key)
    async with client, Progress() as progress:
        target = await prepare(client, chosen)
        progress.say(f"{target.url}: {target.server}, {target.model or 'no model named'}, {target.api} API")
        for scenario, why in chosen.skipped.items():
            progress.say(f"{scenario}: left out: {why}")
        bench = Bench(client, chosen, progress)
        await bench.run()
    stages = bench.stages
    run = Run(
        tool=TOOL,
        started_at=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        command=command,
        commit=machine.commit(),
        settings=chosen.told(),
        target=target,
        machine=machine.describe(),
        slo=str(chosen.slo) if chosen.slo is not None else None,
        stages=stages,
        skipped=chosen.skipped,
        tokens=bench.tokens,
        find_max=bench.find_max,
        batch_advice=bench.batch_advice,
        verdict=verdict(stages, bench.tokens, bench.find_max, bench.batch_advice, target.server == "serve_app"),
    )
    return run if chosen.instance_type is None else priced(run, chosen.instance_type)


def priced(run: Run, instance_type: str) -> Run:
    """With what it costs there, or why that cannot be told."""
    try:
        found = cost.cost(instance_type, run)
    except cost.CostError as error:
        return _saying(run, str(error))
    told = (
        f"If a {found.instance_type} delivers this, a million tokens cost ${found.usd_per_million_output_tokens:.3f} "
        f"({found.stage}; ${found.usd_per_hour:g} an hour as of {found.as_of})."
    )
    old = cost.stale(found.as_of, datetime.now(UTC).date())
    return _saying(run.model_copy(update={"cost": found}), told, *([old] if old is not None else []))


def against(baseline: Run, run: Run, fail_on: float) -> Run:
    """With what a comparison found; a regression fails it."""
    try:
        compared = compare(baseline, run, fail_on=fail_on)
    except ComparisonError as error:
        return _failing(run, Exit.USAGE, [f"the baseline was not compared: {error}"])
    told = _saying(run, f"Against the baseline: {compared.conclusion}", *compared.cautions)
    reasons = compared.client_limited or [_worse(row) for row in compared.regressions]
    return _failing(told, compared.exit_code, reasons)


def _worse(row: Row) -> str:
    shift = f"{row.shift:+.1%}" if row.shift is not None else "more"
    return f"worse than the baseline: {row.where}: {row.metric} {row.baseline:.4g} -> {row.candidate:.4g} ({shift})"


def _failing(run: Run, code: int, reasons: Sequence[str]) -> Run:
    """What the run itself ended with comes first."""
    judged = {"exit_code": run.verdict.exit_code or code, "reasons": [*run.verdict.reasons, *reasons]}
    return run.model_copy(update={"verdict": run.verdict.model_copy(update=judged)})


def _saying(run: Run, *sentences: str) -> Run:
    told = run.verdict.model_copy(update={"sentences": [*run.verdict.sentences, *sentences]})
    return run.model_copy(update={"verdict": told})


async def prepare(client: Client, chosen: Settings) -> Target:
    """Find out what answers there and whether it takes what will be asked. Raises Unreachable."""
    identity = await server.identify(client, chosen.url)
    dialect = client.dialect
    if dialect.model is None and chosen.api == "openai" and identity.models:
        dialect.model = identity.models[0]
    record = await _try(client, chosen)
    if record.error in ("http 400", "http 422") and dialect.fixed_length:
        dialect.fixed_length = False
        record = await _try(client, chosen)
    if identity.metrics is not None:  # these tokens are to be counted before those that count
        await server.read_after(client, identity.metrics, record.tokens)
    if not record.ok:
        raise Unreachable(
            f"{chosen.url} answered a first request of the {chosen.api} API with {record.error}: {record.detail}"
        )
    return Target(
        url=chosen.url,
        api=chosen.api,
        model=dialect.model or (identity.models[0] if identity.models else None),
        server=identity.name,
        on_this_machine=server.is_here(chosen.url),
        fixed_length=dialect.fixed_length,
    )


async def _try(client: Client, chosen: Settings) -> Record:
    record = Record(time.monotonic())
    await client.send(record, Ask((chosen.prompt or "The sea is",), min(4, chosen.max_tokens)))
    return record


def show(run: Run, out: TextIO) -> None:
    """The table, and then what matters."""
    print(f"\n{table(run)}\n", file=out)
    for sentence in run.verdict.sentences:
        print(textwrap.fill(sentence, 80), file=out)
    for advice in run.verdict.recommendations:
        print(textwrap.fill(advice, 80, initial_indent="-> ", subsequent_indent="   "), file=out)
    for reason in run.verdict.reasons:
        print(textwrap.fill(reason, 80, initial_indent="!! ", subsequent_indent="   "), file=out)


if __name__ == "__main__":
    sys.exit(main())
