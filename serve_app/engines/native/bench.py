"""`python -m serve_app.engines.native.bench`: benchmark of the engine in one process, without Ray and HTTP.

Prints tokens per second, TTFT, the time of a step and of its phases, and the share of the machine's memory bandwidth
and arithmetic throughput that a step uses. A run takes about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from serve_app.config import ConfigError, Model
from serve_app.core.requests import GenerationRequest, Grammar, SamplingParams, TokenPrompt
from serve_app.engines.adapters import LoadedAdapter
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native.bench_lora import random_adapters
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.isa import LEVELS, VARIABLE, environment
from serve_app.engines.native.linear import pack
from serve_app.engines.native.machine import NotEnoughMemory
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.protocol import StepStats
from serve_app.engines.stream import TokenStream
from serve_app.serve_file import load_serve_file

_READ_BYTES = 256 * 2**20
_FLOP_SIZE = 1024
# A prompt of _LONG_PROMPT tokens arrives while _RUNNING streams decode.
_RUNNING, _LONG_PROMPT = 8, 512
# Two prompts share their first _PREFIX tokens and differ in the last _TAIL.
_PREFIX, _TAIL = 1000, 10
_TIMEOUT_S = 600.0
# Token ids that every vocabulary has.
_TOKENS = 256
# The seed of the round before the measurements, whose prompts are no others': they would be in the prefix cache.
_WARM_UP = -1
# The grammar that `response_format` makes of a schema whose answers are longer than any output of this benchmark.
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "job": {"enum": ["baker", "miller", "smith"]},
    },
    "required": ["name", "age", "job"],
    "additionalProperties": False,
}
_GRAMMAR = Grammar("json_schema", json.dumps({"type": "array", "items": _PERSON, "minItems": 500}))


class Limits(NamedTuple):
    """The measured limits of this machine: bytes read per second and operations per second of linear layers."""

    bandwidth: float
    flops: float


class Round(NamedTuple):
    """One measurement. Times are in seconds; those of a step are means over the steps in which all streams decode."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    step_s: float
    model_s: float
    sampling_s: float
    rows: float


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.isa and os.environ.get(VARIABLE) != arguments.isa:
        # torch and its libraries read these variables when they are imported.
        given = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "serve_app.engines.native.bench", *given]
        os.execve(sys.executable, command, {**os.environ, **environment(arguments.isa)})  # noqa: S606 (no shell)
    try:
        model = _model(arguments)
        if arguments.compare:
            _compare(model, arguments)
        made: list[tuple[TorchRunner, Limits]] = []

        def make() -> TorchRunner:
            """Measures the limits on the engine's thread: a second thread pool would slow the first one down."""
            runner = TorchRunner.from_config(model, _log)
            made.append((runner, Limits(read_bandwidth(), linear_flops(model, runner))))
            return made[0][0]

        engine = NativeEngine(make, model.native_options)
        began = time.monotonic()
        engine.start()
    except (ConfigError, SourceError, NotEnoughMemory) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    try:
        print(f"{model.source}, {engine.quantization}, {engine.kind}: loaded in {time.monotonic() - began:.1f} s")
        if arguments.adapters:
            _measure_adapters(engine, made[0][0], arguments)
        elif arguments.grammar:
            _measure_grammar(engine, made[0][0], arguments)
        else:
            _measure(engine, *made[0], arguments)
    except KeyboardInterrupt:
        return 130
    finally:
        engine.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.engines.native.bench", description=__doc__)
    parser.add_argument(
        "--config", default="serve_config.yaml", help="file with the model's configuration (default: %(default)s)"
    )
    parser.add_argument("--model", help="name of the model (default: the first in the file)")
    parser.add_argument(
        "--quantization", choices=("auto", "none", "int8", "int4"), help="replaces the value in the file"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="replaces the value in the file")
    parser.add_argument("--draft", type=int, choices=range(8), help="draft tokens; replaces the value in the file")
    parser.add_argument(
        "--isa",
        choices=LEVELS,
        help="run as on a processor without the instruction sets beyond this level (default: all of this processor)",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=("llama.cpp", "vllm"),
        metavar="PEER",
        help="measure instead the service as shipped over HTTP, in turn with llama.cpp or vllm, which must be "
        "installed; `python -m perf.engines` does this and has more options",
    )
    parser.add_argument(
        "--grammar", action="store_true", help="measure only the time that a JSON schema adds to each token"
    )
    parser.add_argument("--adapters", type=int, default=0, help="measure only the cost of so many LoRA adapters")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default: %(default)s)")
    parser.add_argument(
        "--modules",
        nargs="+",
        default=["q_proj", "v_proj"],
        help="layers that the adapters change (default: q_proj v_proj, PEFT's own for Llama)",
    )
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8, 32], help="numbers of concurrent streams (default: 1 8 32)"
    )
    parser.add_argument("--prompt", type=int, default=60, help="tokens in each prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens in each answer (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds of each measurement, of which the median is printed (default: %(default)s)",
    )
    return parser


def _model(arguments: argparse.Namespace) -> Model:
    models = load_serve_file(arguments.config).application.args.models
    found = [model for model in models if arguments.model in (None, model.name)]
    if not found:
        raise ConfigError(f"no model {arguments.model!r} in {arguments.config}")
    chosen: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("quantization", "dtype") if getattr(arguments, name)
    }
    if arguments.draft is not None:
        chosen["engine"] = found[0].native_options.model_copy(update={"draft_tokens": arguments.draft})
    return found[0].model_copy(update=chosen)


def _compare(model: Model, arguments: argparse.Namespace) -> None:
    """Becomes the program that compares servers."""
    options = {
        "--servers": ",".join(["serve_app", *arguments.compare]),
        "--model": model.source,
        "--rounds": arguments.rounds,
        "--prompt-words": arguments.prompt,
        "--max-tokens": arguments.output,
        "--streams": " ".join(map(str, arguments.streams)),
    }
    words = [word for name, value in options.items() for word in (name, *str(value).split(" "))]
    os.execv(sys.executable, [sys.executable, "-m", "perf.engines", *words])  # noqa: S606 (no shell)


def _log(stage: str) -> None:
    print(stage, file=sys.stderr)


def _measure(engine: NativeEngine, runner: TorchRunner, limits: Limits, arguments: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    print(f"{limits.bandwidth / 1e9:.1f} GB/s, {limits.flops / 1e9:.0f} GFLOP/s measured with {threads} threads")
    print(
        f"{'streams':>7}{'tok/s':>7}{'TTFT ms':>9}{'TPOT ms':>9}{'step ms':>9}{'model':>7}{'sample':>8}{'rest':>6}"
        f"{'bandwidth':>11}{'FLOPs':>7}"
    )
    asyncio.run(_round(engine, runner, 1, arguments, _WARM_UP))
    for streams in arguments.streams:
        rounds = [asyncio.run(_round(engine, runner, streams, arguments, seed)) for seed in range(arguments.rounds)]
        m = Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))
        kv_bytes = streams * (arguments.prompt + arguments.output / 2) * runner.token_bytes
        bandwidth = (runner.weight_bytes + kv_bytes) / m.step_s / limits.bandwidth
        flops = 2 * runner.weight_count * m.rows / m.step_s / limits.flops
        ttft, tpot, step, model, sampling = (1e3 * s for s in (m.ttft_s, m.tpot_s, m.step_s, m.model_s, m.sampling_s))
        print(
            f"{streams:>7}{m.tokens_per_s:>7.0f}{ttft:>9.2f}{tpot:>9.2f}{step:>9.2f}{model:>7.2f}{sampling:>8.2f}"
            f"{step - model - sampling:>6.2f}{bandwidth:>11.0%}{flops:>7.0%}"
        )
    print(asyncio.run(_measure_long_prompt(engine)))
    print(asyncio.run(_measure_prefix_cache(engine, runner)))
    stats = engine.stats()
    if stats.drafted:
        print(f"draft tokens: {stats.drafted}, {stats.accepted / stats.drafted:.0%} accepted (--draft 0 disables them)")


def _measure_grammar(engine: NativeEngine, runner: TorchRunner, arguments: argparse.Namespace) -> None:
    """Alternate rounds with and without a grammar, so that a slowdown of the machine affects both."""
    print(f"{'streams':>7}{'ms/token':>10}{'with JSON schema':>18}{'added':>8}")
    asyncio.run(_round(engine, runner, 1, arguments, _WARM_UP, grammar=_GRAMMAR))
    for streams in arguments.streams:
        pairs = [
            [asyncio.run(_round(engine, runner, streams, arguments, seed, each)).tpot_s for each in (None, _GRAMMAR)]
            for seed in range(arguments.rounds)
        ]
        free, shaped = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{streams:>7}{free:>10.2f}{shaped:>18.2f}{shaped - free:>8.2f}")


def _measure_adapters(engine: NativeEngine, runner: TorchRunner, arguments: argparse.Namespace) -> None:
    """Alternate rounds of the model alone and with adapters, which the streams use in turn."""
    adapters = random_adapters(runner.forward_pass, arguments.adapters, arguments.rank, arguments.modules)
    print(f"{'streams':>7}{'tok/s':>8}{'with adapters':>15}{'ratio':>7}{'step ms':>9}{'with adapters':>15}")
    asyncio.run(_round(engine, runner, 1, arguments, _WARM_UP, adapters=adapters))
    for streams in arguments.streams:
        pairs = [
            [asyncio.run(_round(engine, runner, streams, arguments, seed, adapters=each)) for each in ((), adapters)]
            for seed in range(arguments.rounds)
        ]
        ratio = statistics.median(adapted.tokens_per_s / plain.tokens_per_s for plain, adapted in pairs)
        plain, adapted = (
            Round(*map(statistics.median, zip(*column, strict=True))) for column in zip(*pairs, strict=True)
        )
        print(
            f"{streams:>7}{plain.tokens_per_s:>8.0f}{adapted.tokens_per_s:>15.0f}{ratio:>7.2f}"
            f"{1e3 * plain.step_s:>9.2f}{1e3 * adapted.step_s:>15.2f}"
        )


async def _measure_long_prompt(engine: NativeEngine) -> str:
    """The time between tokens of running streams while a long prompt is computed."""
    rng = random.Random("beside")
    running = _admit(engine, [_prompt(rng, 60) for _ in range(_RUNNING)], tokens=300)
    readers = [asyncio.create_task(_times(stream)) for stream in running]
    await asyncio.sleep(1.0)
    (long_prompt,) = _admit(engine, [_prompt(rng, _LONG_PROMPT)], tokens=1)
    arrived = long_prompt.arrived - running[0].arrived
    ttft_s = (await _times(long_prompt))[0]
    pairs = [pair for times in await asyncio.gather(*readers) for pair in itertools.pairwise(times)]
    during = [b - a for a, b in pairs if arrived < b <= arrived + ttft_s]
    otherwise = [b - a for a, b in pairs if a > 0.3 and (b <= arrived or a > arrived + ttft_s)]
    usual_s, disturbed_s = _p99(otherwise), _p99(during)
    return (
        f"{_LONG_PROMPT}-token prompt beside {_RUNNING} streams: ITL p99 {1e3 * disturbed_s:.1f} ms, "
        f"{disturbed_s / usual_s:.2f} times the usual {1e3 * usual_s:.1f} ms; TTFT of the prompt {1e3 * ttft_s:.0f} ms"
    )


async def _measure_prefix_cache(engine: NativeEngine, runner: TorchRunner) -> str:
    """The TTFT of a prompt whose prefix is cached, against the TTFT of the same prefix the first time."""
    tokens = min(_PREFIX, runner.context - _TAIL - 2)
    cold: list[float] = []
    warm: list[float] = []
    for number in range(3):
        rng = random.Random(f"again {number}")
        prefix = _prompt(rng, tokens)
        for ttfts in (cold, warm):
            (stream,) = _admit(engine, [(*prefix, *_prompt(rng, _TAIL))], tokens=1)
            ttfts += await _times(stream)
    cold_s, warm_s = statistics.median(cold), statistics.median(warm)
    return (
        f"{tokens}-token prefix from the cache: TTFT {1e3 * warm_s:.1f} ms, "
        f"{warm_s / cold_s:.3f} times the {1e3 * cold_s:.0f} ms without it"
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))] if values else float("nan")


def _prompt(rng: random.Random, tokens: int) -> tuple[int, ...]:
    return tuple(rng.randrange(_TOKENS) for _ in range(tokens))


def _admit(
    engine: NativeEngine,
    prompts: list[tuple[int, ...]],
    tokens: int,
    grammar: Grammar | None = None,
    adapters: Sequence[LoadedAdapter] = (),
) -> list[TokenStream]:
    """The streams of requests that arrive together; each answer has `tokens` tokens. They use the adapters in turn."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, grammar=grammar)
    began = time.monotonic()
    streams = [
        TokenStream(GenerationRequest(str(i), "m", TokenPrompt(prompt), params, began, began + _TIMEOUT_S))
        for i, prompt in enumerate(prompts)
    ]
    if adapters:
        for stream, adapter in zip(streams, itertools.cycle(adapters), strict=False):
            stream.adapter = adapter
    refusals = [refusal for refusal in engine.admit(streams) if refusal is not None]
    if refusals:
        raise ConfigError(str(refusals[0]))
    return streams


async def _round(
    engine: NativeEngine,
    runner: TorchRunner,
    streams: int,
    arguments: argparse.Namespace,
    seed: int,
    grammar: Grammar | None = None,
    adapters: Sequence[LoadedAdapter] = (),
) -> Round:
    """One measurement of `streams` requests that arrive together."""
    rng = random.Random(f"{streams} {seed}")
    prompts = [_prompt(rng, arguments.prompt) for _ in range(streams)]
    members = _admit(engine, prompts, arguments.output, grammar, adapters)
    started: list[tuple[StepStats, float]] = []
    times = await asyncio.gather(
        *(_times(s, lambda: started.append((engine.stats(), runner.sampling_s))) for s in members)
    )
    after, before = engine.stats(), started[-1][0]  # all streams decode after the first token of the last one
    steps = max(1, after.steps - before.steps)
    busy_s, delivery_s = after.busy_s - before.busy_s, after.delivery_s - before.delivery_s
    sampling_s = runner.sampling_s - started[-1][1]
    return Round(
        tokens_per_s=streams * arguments.output / max(one[-1] for one in times),
        ttft_s=statistics.median(one[0] for one in times),
        tpot_s=statistics.median((one[-1] - one[0]) / max(1, len(one) - 1) for one in times),
        step_s=(busy_s + delivery_s) / steps,
        model_s=(busy_s - (after.planning_s - before.planning_s) - sampling_s) / steps,
        sampling_s=sampling_s / steps,
        rows=(after.rows - before.rows) / steps,
    )


async def _times(stream: TokenStream, on_start: Callable[[], None] = lambda: None) -> list[float]:
    """The time of each token in seconds after the request's arrival; `on_start` is called at the first."""
    times: list[float] = []
    async for chunk in stream.chunks(0.0):
        if not times:
            on_start()
        times += [event.elapsed_s for event in chunk.events]
    return times


def linear_flops(model: Model, runner: TorchRunner) -> float:
    """Operations per second of a linear layer with the model's quantization on 1,024 rows, the best of five passes."""
    x = torch.ones(_FLOP_SIZE, _FLOP_SIZE, dtype=runner.dtype)
    linear = pack(torch.ones(_FLOP_SIZE, _FLOP_SIZE, dtype=runner.dtype), None, runner.quantization)
    return 2 * _FLOP_SIZE**3 / _best(lambda: linear(x))


def read_bandwidth() -> float:
    """Bytes per second of reading 256 MiB of memory, which no cache holds, the best of five passes."""
    block = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    return _READ_BYTES / _best(block.sum)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
