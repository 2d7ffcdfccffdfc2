"""`python -m perf.suite`: measures a service over HTTP, prints a verdict and writes the results."""

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
from perf.scenarios import ScenarioRunner
from perf.server import Unreachable
from perf.settings import Settings, settings
from perf.table import table
from perf.verdict import Tuning, verdict
from perf.workload import Request

TOOL = "serve_app perf.suite"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(arguments)
    command = ["python", "-m", "perf.suite", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        chosen = settings(args, options.error)
        baseline = Run.read(args.baseline) if args.baseline is not None else None
        key = args.api_key_file.read_text().strip() if args.api_key_file is not None else None
        if key is not None and len(key.split()) != 1:
            options.error(f"{args.api_key_file}: expected one line with the key")
        # A wrong --output fails before the measurement, not after it.
        export.folder_of(args.output).mkdir(parents=True, exist_ok=True)
        if chosen.instance_type is not None:
            cost.find(chosen.instance_type)
    except (ResultsError, TraceError, cost.CostError) as error:
        options.error(str(error))
    except UnicodeDecodeError:
        options.error("one of the given files is not a text file")
    except OSError as error:
        options.error(f"{error.filename}: {error.strerror}")
    try:
        run = loop.run(measure(chosen, command, key))
    except Unreachable as error:
        print(f"perf.suite: {error}", file=sys.stderr)
        return Exit.UNREACHABLE
    except KeyboardInterrupt:
        print("interrupted; no results were written", file=sys.stderr)
        return Exit.INTERRUPTED
    if baseline is not None:
        run = with_comparison(baseline, run, FAIL_ON if args.fail_on is None else args.fail_on)
    if args.json:
        print(run.model_dump_json(indent=1))
    out = sys.stderr if args.json else sys.stdout
    show(run, out)
    try:
        written = export.write_all(run, args.output)
    except OSError as error:  # the table and the verdict are already printed
        print(f"perf.suite: {error.filename}: {error.strerror}; give another --output", file=sys.stderr)
        return Exit.USAGE
    print(f"\n{' '.join(map(str, written))}", file=out)
    return run.verdict.exit_code


async def measure(chosen: Settings, command: list[str], key: str | None) -> Run:
    """Raises Unreachable."""
    started_at, start = datetime.now(UTC), time.monotonic()
    client = Client(chosen.url, DIALECTS[chosen.api](chosen.model, chosen.fixed_length), chosen.timeout_s, key)
    async with client, Progress() as progress:
        target = await prepare(client, chosen)
        progress.print(f"{target.url}: {target.server}, model {target.model or 'not known'}, {target.api} API")
        for scenario, why in chosen.skipped.items():
            progress.print(f"{scenario}: skipped: {why}")
        runner = ScenarioRunner(client, chosen, progress)
        await runner.run()
    stages = runner.stages
    run = Run(
        tool=TOOL,
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
        command=command,
        commit=machine.commit(),
        settings=chosen.to_results(),
        target=target,
        machine=machine.describe(),
        slo=str(chosen.slo) if chosen.slo is not None else None,
        stages=stages,
        skipped=chosen.skipped,
        tokens=runner.tokens,
        find_max=runner.find_max,
        batch_advice=runner.batch_advice,
        verdict=verdict(stages, runner.tokens, runner.find_max, runner.batch_advice, _tuning(target)),
    )
    return run if chosen.instance_type is None else with_cost(run, chosen.instance_type)


def with_cost(run: Run, instance_type: str) -> Run:
    """Adds the cost of tokens on this instance type, or the reason why it is not known."""
    try:
        found = cost.cost(instance_type, run)
    except cost.CostError as error:
        return _with_sentences(run, str(error))
    sentence = (
        f"If a {found.instance_type} has this throughput, a million output tokens cost "
        f"${found.usd_per_million_output_tokens:.3f} ({found.stage}; ${found.usd_per_hour:g} per hour as of "
        f"{found.as_of})."
    )
    stale = cost.stale(found.as_of, datetime.now(UTC).date())
    return _with_sentences(run.model_copy(update={"cost": found}), sentence, *([stale] if stale is not None else []))


def with_comparison(baseline: Run, run: Run, fail_on: float) -> Run:
    """Adds the comparison with the baseline; a regression fails the run."""
    try:
        comparison = compare(baseline, run, fail_on=fail_on)
    except ComparisonError as error:
        return _with_failure(run, Exit.USAGE, [f"the baseline was not compared: {error}"])
    run = _with_sentences(run, f"Against the baseline: {comparison.conclusion}", *comparison.cautions)
    reasons = comparison.client_limited or [_regression(row) for row in comparison.regressions]
    return _with_failure(run, comparison.exit_code, reasons)


def _regression(row: Row) -> str:
    shift = f"{row.shift:+.1%}" if row.shift is not None else "more"
    return f"worse than the baseline: {row.where}: {row.metric} {row.baseline:.4g} -> {row.candidate:.4g} ({shift})"


def _with_failure(run: Run, code: int, reasons: Sequence[str]) -> Run:
    """The run's own exit code takes precedence."""
    update = {"exit_code": run.verdict.exit_code or code, "reasons": [*run.verdict.reasons, *reasons]}
    return run.model_copy(update={"verdict": run.verdict.model_copy(update=update)})


def _with_sentences(run: Run, *sentences: str) -> Run:
    update = {"sentences": [*run.verdict.sentences, *sentences]}
    return run.model_copy(update={"verdict": run.verdict.model_copy(update=update)})


def _tuning(target: Target) -> Tuning:
    return Tuning(target.server == "serve_app", target.quantization)


async def prepare(client: Client, chosen: Settings) -> Target:
    """Identifies the server and checks that it accepts the requests of the run. Raises Unreachable."""
    info = await server.identify(client, chosen.url)
    dialect = client.dialect
    if dialect.model is None and chosen.api == "openai" and info.models:
        dialect.model = info.models[0]
    record = await _send_test_request(client, chosen)
    if record.error in ("http 400", "http 422") and dialect.fixed_length:
        dialect.fixed_length = False
        record = await _send_test_request(client, chosen)
    if info.counters is not None:  # the server must count these tokens before the first scenario starts
        await server.read_after(client, info.counters, record.tokens)
    if not record.ok:
        raise Unreachable(
            f"{chosen.url}: the first request of the {chosen.api} API failed with {record.error}: {record.detail}"
        )
    model = dialect.model or (info.models[0] if info.models else None)
    return Target(
        url=chosen.url,
        api=chosen.api,
        model=model,
        server=info.name,
        on_this_machine=server.is_local(chosen.url),
        quantization=await server.quantization(client, model),
        fixed_length=dialect.fixed_length,
    )


async def _send_test_request(client: Client, chosen: Settings) -> Record:
    record = Record(time.monotonic())
    await client.send(record, Request((chosen.prompt or "The sea is",), min(4, chosen.max_tokens)))
    return record


def show(run: Run, out: TextIO) -> None:
    """Prints the table of stages and the verdict."""
    print(f"\n{table(run)}\n", file=out)
    for sentence in run.verdict.sentences:
        print(textwrap.fill(sentence, 80), file=out)
    for advice in run.verdict.recommendations:
        print(textwrap.fill(advice, 80, initial_indent="-> ", subsequent_indent="   "), file=out)
    for reason in run.verdict.reasons:
        print(textwrap.fill(reason, 80, initial_indent="!! ", subsequent_indent="   "), file=out)


if __name__ == "__main__":
    sys.exit(main())
