"""`python -m serve_app.engines.native.bench`: the engine alone, in this process, without Ray and HTTP.

Prints tokens a second, TTFT, the time of a step and of its phases, and how much it uses of the memory bandwidth and the
arithmetic measured here, so that a change to the engine can be judged in a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from serve_app.config import ConfigError, Model, load_serve_file
from serve_app.core.requests import GenerationRequest, Grammar, SamplingParams, TokenPrompt
from serve_app.engines.native.engine import Engine, EngineStats
from serve_app.engines.native.linear import pack
from serve_app.engines.native.loader import SourceError
from serve_app.engines.native.machine import NotEnoughMemory
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.native.stream import TokenStream

_READ_BYTES = 256 * 2**20
_FLOP_SIZE = 1024
# Streams that run, and the prompt that comes; the beginning that comes again, with another end.
_RUNNING, _NEWCOMER = 8, 512
_BEGINNING, _TAIL = 1000, 10
_PATIENCE_S = 600.0
# What `response_format` would make of its schema; no answer can end before it is as long as it was asked to be.
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
    """What this machine gives, measured: bytes a second of reading, and operations a second of the linear layers."""

    bandwidth: float
    flops: float


class Round(NamedTuple):
    """One concurrency's measurement. Times in seconds; those of a step are means while all decode."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    step_s: float
    model_s: float
    sampling_s: float
    rows: float


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        model = _model(arguments)
        made: list[tuple[TorchRunner, Limits]] = []

        def make() -> TorchRunner:
            """On the engine's thread, the limits too: a second thread's pool would slow the first one down."""
            runner = TorchRunner.from_config(model, _say)
            made.append((runner, Limits(read_bandwidth(), linear_flops(model, runner))))
            return made[0][0]

        engine = Engine(make, model.engine)
        began = time.monotonic()
        engine.start()
    except (ConfigError, SourceError, NotEnoughMemory) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    try:
        print(f"{model.source}, {model.quantization}, {engine.kind}: loaded in {time.monotonic() - began:.1f} s")
        if arguments.grammar:
            _with_grammar(engine, made[0][0], arguments)
        else:
            _measure(engine, *made[0], arguments)
    except KeyboardInterrupt:
        return 130
    finally:
        engine.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.engines.native.bench", description=__doc__)
    parser.add_argument("--config", default="serve_config.yaml", help="take the model from here (default: %(default)s)")
    parser.add_argument("--model", help="which of its models (default: the first)")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), help="instead of the file's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of the file's")
    parser.add_argument("--draft", type=int, choices=range(8), help="tokens to guess ahead, instead of the file's")
    parser.add_argument("--grammar", action="store_true", help="only what a JSON schema adds to the time of a token")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="at once (default: 1 8 32)")
    parser.add_argument("--prompt", type=int, default=60, help="tokens in each prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens in each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each; medians count (default: %(default)s)")
    return parser


def _model(arguments: argparse.Namespace) -> Model:
    models = load_serve_file(arguments.config).args.models
    found = [model for model in models if arguments.model in (None, model.name)]
    if not found:
        raise ConfigError(f"no model {arguments.model!r} in {arguments.config}")
    chosen: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("quantization", "dtype") if getattr(arguments, name)
    }
    if arguments.draft is not None:
        chosen["engine"] = found[0].engine.model_copy(update={"draft_tokens": arguments.draft})
    return found[0].model_copy(update=chosen)


def _say(stage: str) -> None:
    print(stage, file=sys.stderr)


def _measure(engine: Engine, runner: TorchRunner, limits: Limits, arguments: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    print(f"{limits.bandwidth / 1e9:.1f} GB/s, {limits.flops / 1e9:.0f} GFLOP/s measured here, on {threads} threads")
    print(
        f"{'streams':>7}{'tok/s':>7}{'TTFT ms':>9}{'TPOT ms':>9}{'step ms':>9}{'model':>7}{'sample':>8}{'rest':>6}"
        f"{'bandwidth':>11}{'FLOPs':>7}"
    )
    asyncio.run(_round(engine, runner, 1, arguments, seed=0))  # warm
    for streams in arguments.streams:
        rounds = [asyncio.run(_round(engine, runner, streams, arguments, seed)) for seed in range(arguments.rounds)]
        m = Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))
        kept = streams * (arguments.prompt + arguments.output / 2) * runner.token_bytes
        bandwidth = (runner.weight_bytes + kept) / m.step_s / limits.bandwidth
        flops = 2 * runner.weight_count * m.rows / m.step_s / limits.flops
        ttft, tpot, step, model, sampling = (1e3 * s for s in (m.ttft_s, m.tpot_s, m.step_s, m.model_s, m.sampling_s))
        print(
            f"{streams:>7}{m.tokens_per_s:>7.0f}{ttft:>9.2f}{tpot:>9.2f}{step:>9.2f}{model:>7.2f}{sampling:>8.2f}"
            f"{step - model - sampling:>6.2f}{bandwidth:>11.0%}{flops:>7.0%}"
        )
    print(asyncio.run(_beside(engine)))
    print(asyncio.run(_again(engine, runner)))
    stats = engine.stats()
    if stats.drafted:
        print(f"guessed ahead: {stats.drafted} tokens, {stats.accepted / stats.drafted:.0%} right (--draft 0: none)")


def _with_grammar(engine: Engine, runner: TorchRunner, arguments: argparse.Namespace) -> None:
    """With and without in turn, so that a machine that slows down does so for both."""
    print(f"{'streams':>7}{'ms/token':>10}{'with JSON schema':>18}{'added':>8}")
    asyncio.run(_round(engine, runner, 1, arguments, seed=0, grammar=_GRAMMAR))  # warm
    for streams in arguments.streams:
        pairs = [
            [asyncio.run(_round(engine, runner, streams, arguments, seed, each)).tpot_s for each in (None, _GRAMMAR)]
            for seed in range(arguments.rounds)
        ]
        free, shaped = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{streams:>7}{free:>10.2f}{shaped:>18.2f}{shaped - free:>8.2f}")


async def _beside(engine: Engine) -> str:
    """What a long prompt does to the gaps of streams that run already."""
    rng = random.Random("beside")
    running = _admitted(engine, [_prompt(rng, 60) for _ in range(_RUNNING)], tokens=300)
    readers = [asyncio.create_task(_times(stream)) for stream in running]
    await asyncio.sleep(1.0)
    (newcomer,) = _admitted(engine, [_prompt(rng, _NEWCOMER)], tokens=1)
    arrived = newcomer.arrived - running[0].arrived
    ttft_s = (await _times(newcomer))[0]
    pairs = [pair for times in await asyncio.gather(*readers) for pair in itertools.pairwise(times)]
    beside = [b - a for a, b in pairs if arrived < b <= arrived + ttft_s]
    alone = [b - a for a, b in pairs if a > 0.3 and (b <= arrived or a > arrived + ttft_s)]
    usual, disturbed = _p99(alone), _p99(beside)
    return (
        f"{_NEWCOMER}-token prompt beside {_RUNNING} streams: gap p99 {1e3 * disturbed:.1f} ms, "
        f"{disturbed / usual:.2f} times the usual {1e3 * usual:.1f}; its own TTFT {1e3 * ttft_s:.0f} ms"
    )


async def _again(engine: Engine, runner: TorchRunner) -> str:
    """The same beginning twice."""
    tokens = min(_BEGINNING, runner.context - _TAIL - 2)
    cold: list[float] = []
    warm: list[float] = []
    for number in range(3):
        rng = random.Random(f"again {number}")
        beginning = _prompt(rng, tokens)
        for ttfts in (cold, warm):
            (stream,) = _admitted(engine, [(*beginning, *_prompt(rng, _TAIL))], tokens=1)
            ttfts += await _times(stream)
    was, now = statistics.median(cold), statistics.median(warm)
    return (
        f"{tokens}-token beginning again: TTFT {1e3 * now:.1f} ms, {now / was:.3f} of the first time's {1e3 * was:.0f}"
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))] if values else float("nan")


def _prompt(rng: random.Random, tokens: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1000) for _ in range(tokens))


def _admitted(
    engine: Engine, prompts: list[tuple[int, ...]], tokens: int, grammar: Grammar | None = None
) -> list[TokenStream]:
    """Streams of requests that come together, each to its full length."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, grammar=grammar)
    began = time.monotonic()
    streams = [
        TokenStream(GenerationRequest(str(i), "m", TokenPrompt(prompt), params, began, began + _PATIENCE_S))
        for i, prompt in enumerate(prompts)
    ]
    refusals = [refusal for refusal in engine.admit(streams) if refusal is not None]
    if refusals:
        raise ConfigError(str(refusals[0]))
    return streams


async def _round(
    engine: Engine,
    runner: TorchRunner,
    streams: int,
    arguments: argparse.Namespace,
    seed: int,
    grammar: Grammar | None = None,
) -> Round:
    """All requests at once, each to its full length."""
    rng = random.Random(f"{streams} {seed}")
    prompts = [_prompt(rng, arguments.prompt) for _ in range(streams)]
    members = _admitted(engine, prompts, arguments.output, grammar)
    begun: list[tuple[EngineStats, float]] = []
    times = await asyncio.gather(
        *(_times(s, lambda: begun.append((engine.stats(), runner.sampling_s))) for s in members)
    )
    after, before = engine.stats(), begun[-1][0]  # all of them decode from the last one's first token on
    steps = max(1, after.steps - before.steps)
    busy_s, telling_s = after.busy_s - before.busy_s, after.telling_s - before.telling_s
    sampling_s = runner.sampling_s - begun[-1][1]
    return Round(
        tokens_per_s=streams * arguments.output / max(one[-1] for one in times),
        ttft_s=statistics.median(one[0] for one in times),
        tpot_s=statistics.median((one[-1] - one[0]) / max(1, len(one) - 1) for one in times),
        step_s=(busy_s + telling_s) / steps,
        model_s=(busy_s - (after.planning_s - before.planning_s) - sampling_s) / steps,
        sampling_s=sampling_s / steps,
        rows=(after.rows - before.rows) / steps,
    )


async def _times(stream: TokenStream, begun: Callable[[], None] = lambda: None) -> list[float]:
    """When each token came, in seconds since its request did."""
    times: list[float] = []
    async for chunk in stream.chunks(0.0):
        if not times:
            begun()
        times += [event.elapsed_s for event in chunk.events]
    return times


def linear_flops(model: Model, runner: TorchRunner) -> float:
    """Operations a second of a linear layer of this kind on many rows, the best of a few passes."""
    x = torch.ones(_FLOP_SIZE, _FLOP_SIZE, dtype=runner.dtype)
    linear = pack(torch.ones(_FLOP_SIZE, _FLOP_SIZE, dtype=runner.dtype), None, runner.quantization)
    return 2 * _FLOP_SIZE**3 / _best(lambda: linear(x))


def read_bandwidth() -> float:
    """Bytes a second of reading memory that no cache holds, the best of a few passes."""
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
