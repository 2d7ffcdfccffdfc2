"""`python -m perf.engines`: compares this service's engines with vLLM, llama.cpp or any other server in one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import pynvml

from perf import machine
from perf.engines.launch import LaunchError, ModelFiles, check_installed, model_files
from perf.engines.process import interruptible
from perf.engines.results import EngineComparison
from perf.engines.rounds import Rounds
from perf.engines.settings import EngineSettings, parser, settings
from perf.engines.table import markdown
from perf.exits import Exit

_PACKAGES = ("serve_app", "vllm", "ray", "torch", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    host = machine.describe()
    chosen = settings(options.parse_args(words), host.gpus, options.error)
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
        check_installed(chosen)
    except OSError as error:
        options.error(f"{error.filename}: {error.strerror}; give another --output")
    except LaunchError as error:
        options.error(str(error))
    started_at, commit = datetime.now(UTC).isoformat(timespec="seconds"), machine.commit()
    rounds, code = _run(chosen)
    comparison = EngineComparison(
        started_at=started_at,
        command=["python", "-m", "perf.engines", *words],
        commit=commit,
        settings=chosen.to_results(),
        machine=host,
        versions=_versions(),
        starts=rounds.starts,
        idle_cpu=rounds.idle_cpu,
        turns=rounds.results,
    )
    if comparison.turns:
        _write(comparison, chosen)
    return code or _exit_code(comparison)


def _run(chosen: EngineSettings) -> tuple[Rounds, int]:
    """What was measured, also if a failure or Ctrl-C ended the measurement, and the exit code."""
    rounds = Rounds(chosen, ModelFiles())
    try:
        with interruptible():
            rounds.line.print("looking for the model's files")
            rounds.model = model_files(chosen)
            rounds.run()
    except LaunchError as error:
        rounds.line.print(f"perf.engines: {error}")
        return rounds, Exit.UNREACHABLE
    except KeyboardInterrupt:
        rounds.line.print("interrupted; all servers are stopped")
        return rounds, Exit.INTERRUPTED
    return rounds, Exit.OK


def _write(comparison: EngineComparison, chosen: EngineSettings) -> None:
    text = markdown(comparison)
    print(text)
    (chosen.output / "engines.json").write_text(comparison.model_dump_json(indent=1))
    (chosen.output / "engines.md").write_text(f"{text}\n")
    print(f"\n{chosen.output / 'engines.json'} {chosen.output / 'engines.md'}", file=sys.stderr)


def _exit_code(comparison: EngineComparison) -> int:
    stages = [stage for turn in comparison.turns for stage in turn.run.stages]
    if any(stage.client.limited for stage in stages):
        return Exit.CLIENT_LIMITED
    return Exit.FAILED if any(stage.failed or not stage.requests for stage in stages) else Exit.OK


def _versions() -> dict[str, str]:
    """Those of the packages that are installed, and of the GPU's driver."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        found["NVIDIA driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    return found


if __name__ == "__main__":
    sys.exit(main())
