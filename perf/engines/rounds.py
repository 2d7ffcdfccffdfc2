"""Runs the servers in turn and measures each with the suite's load."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from perf import loop, options, suite
from perf.engines.launch import MODEL, LaunchError, ModelFiles, launch
from perf.engines.process import ServerProcess
from perf.engines.results import Start, TurnResult
from perf.engines.settings import EngineSettings
from perf.progress import LiveLine
from perf.results import Run
from perf.server import Unreachable
from perf.settings import settings as suite_settings

_WARMUP_S = 1.0
_IDLE_S = 3.0
_REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Turn:
    """The windows of one server that follow each other, one for each number of streams. Rounds count from 1."""

    round: int
    server: str
    streams: tuple[int, ...]


def turns(rounds: int, servers: Sequence[str], streams: Sequence[int], keep: bool) -> Iterator[Turn]:
    """The order of the measurement.

    With `keep` all servers run, and those at the same number of streams follow each other. Otherwise a turn starts its
    server, measures it at each number of streams and stops it.
    """
    levels = [(count,) for count in streams] if keep else [tuple(streams)]
    for number in range(1, rounds + 1):
        for level in levels:
            for server in servers:
                yield Turn(number, server, level)


@dataclass
class Rounds:
    """Measures all turns. The results hold what is complete so far."""

    settings: EngineSettings
    model: ModelFiles
    line: LiveLine = field(default_factory=LiveLine)
    starts: list[Start] = field(default_factory=list)
    results: list[TurnResult] = field(default_factory=list)
    idle_cpu: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Raises LaunchError if a server does not start or stops answering."""
        chosen = self.settings
        with ExitStack() as running:
            kept: dict[str, ServerProcess] = {}
            for server in chosen.servers if chosen.keep else ():
                kept[server] = running.enter_context(self._started(server, 1))
            self._measure_idle(kept)
            for turn in turns(chosen.rounds, chosen.servers, chosen.streams, chosen.keep):
                if turn.server in kept:
                    self._measure(turn, kept[turn.server])
                else:
                    with self._started(turn.server, turn.round) as process:
                        self._measure(turn, process)

    @contextmanager
    def _started(self, server: str, number: int) -> Iterator[ServerProcess]:
        """A server that answers and is warm."""
        log = self.settings.output.resolve() / f"{server}-{number}.log"
        with ServerProcess(
            lambda port, folder: launch(server, self.settings, self.model, port, folder), log
        ) as process:
            seconds = process.wait_until_ready(self.settings.start_timeout_s, self.line)
            self.starts.append(Start(server=server, round=number, seconds=round(seconds, 1)))
            self.line.print(f"{server}: answers after {seconds:.0f} s; the next load warms it up")
            self._load(process, (max(self.settings.streams),), _WARMUP_S, number, "--warmup", "0")
            yield process

    def _measure(self, turn: Turn, process: ServerProcess) -> None:
        self.line.print(f"round {turn.round} of {self.settings.rounds}: {turn.server}")
        run = self._load(process, turn.streams, self.settings.duration_s, turn.round)
        self.results.append(TurnResult(round=turn.round, server=turn.server, run=run))

    def _measure_idle(self, servers: Mapping[str, ServerProcess]) -> None:
        """The share of a core that each server uses while no server has a request."""
        if not servers:
            return
        before = {server: process.cpu_seconds() for server, process in servers.items()}
        start = time.monotonic()
        time.sleep(_IDLE_S)
        for server, process in servers.items():
            self.idle_cpu[server] = round((process.cpu_seconds() - before[server]) / (time.monotonic() - start), 3)
        shares = ", ".join(f"{server} {share:.2f}" for server, share in self.idle_cpu.items())
        self.line.print(f"cores used while idle: {shares}")

    def _load(self, process: ServerProcess, streams: Sequence[int], duration_s: float, number: int, *more: str) -> Run:
        """One run of the suite. All servers of a round get the same prompts, apart from their first words."""
        chosen = self.settings
        arguments: dict[str, Any] = {
            "--url": process.launch.url,
            "--api": "openai",
            "--model": MODEL,
            "--only": "concurrency",
            "--duration": f"{duration_s:g}s",
            "--prompt-words": chosen.prompt_words,
            "--max-tokens": chosen.max_tokens,
            "--seed": number,
            "--timeout": f"{_REQUEST_TIMEOUT_S}s",
        }
        words = [str(word) for pair in arguments.items() for word in pair]
        words += ["--concurrency", *map(str, streams), *more]
        parser = options.parser()
        load = suite_settings(parser.parse_args(words), parser.error)
        try:
            return loop.run(suite.measure(load, ["python", "-m", "perf.suite", *words], None))
        except Unreachable as error:
            raise LaunchError(f"{process.launch.server}: {error}\n{process.last_lines()}") from None
