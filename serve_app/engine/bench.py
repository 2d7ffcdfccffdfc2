"""`python -m serve_app.engine.bench`: the engine alone, in this process, without Ray and HTTP.

Prints tokens a second, TTFT, step times, and how much of the memory bandwidth measured here a step uses, so that a
change to the engine can be judged in a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from typing import NamedTuple

import torch

from serve_app.config import ConfigError, Model, load_serve_file
from serve_app.engine.engine import Engine
from serve_app.engine.loader import SourceError
from serve_app.engine.memory import NotEnoughMemory
from serve_app.engine.runner import TorchRunner
from serve_app.engine.stream import TokenStream
from serve_app.types import GenerationRequest, SamplingParams, TokenPrompt

_READ_BYTES = 256 * 2**20
_PATIENCE_S = 600.0


class Round(NamedTuple):
    """One concurrency's measurement. Times in seconds."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    step_s: float


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        model = _model(arguments)
        made: list[tuple[TorchRunner, float]] = []

        def make() -> TorchRunner:
            """On the engine's thread, the bandwidth too: a second thread's pool would slow the first one down."""
            made.append((TorchRunner.from_config(model, _say), read_bandwidth()))
            return made[0][0]

        engine = Engine(make, model.engine)
        began = time.monotonic()
        engine.start()
    except (ConfigError, SourceError, NotEnoughMemory) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    try:
        print(f"{model.source}, {model.quantization}, {engine.kind}: loaded in {time.monotonic() - began:.1f} s")
        _measure(engine, *made[0], arguments)
    except KeyboardInterrupt:
        return 130
    finally:
        engine.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.engine.bench", description=__doc__)
    parser.add_argument("--config", default="serve_config.yaml", help="take the model from here (default: %(default)s)")
    parser.add_argument("--model", help="which of its models (default: the first)")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), help="instead of the file's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of the file's")
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
    chosen = {name: getattr(arguments, name) for name in ("quantization", "dtype") if getattr(arguments, name)}
    return found[0].model_copy(update=chosen)


def _say(stage: str) -> None:
    print(stage, file=sys.stderr)


def _measure(engine: Engine, runner: TorchRunner, bandwidth: float, arguments: argparse.Namespace) -> None:
    print(f"memory reads at {bandwidth / 1e9:.1f} GB/s here, on {torch.get_num_threads()} threads")
    print(f"{'streams':>8}{'tok/s':>9}{'TTFT ms':>9}{'TPOT ms':>9}{'step ms':>9}{'of bandwidth':>14}")
    asyncio.run(_round(engine, 1, arguments, seed=0))  # warm
    for streams in arguments.streams:
        rounds = [asyncio.run(_round(engine, streams, arguments, seed)) for seed in range(arguments.rounds)]
        rate, ttft_s, tpot_s, step_s = (statistics.median(column) for column in zip(*rounds, strict=True))
        kept = streams * (arguments.prompt + arguments.output / 2) * runner.token_bytes
        share = (runner.weight_bytes + kept) / step_s / bandwidth
        times = "".join(f"{seconds * 1e3:>9.2f}" for seconds in (ttft_s, tpot_s, step_s))
        print(f"{streams:>8}{rate:>9.0f}{times}{share:>14.0%}")


async def _round(engine: Engine, streams: int, arguments: argparse.Namespace, seed: int) -> Round:
    """All requests at once, each to its full length."""
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=arguments.output, temperature=0.0, ignore_eos=True)
    prompts = [TokenPrompt(tuple(rng.randrange(1000) for _ in range(arguments.prompt))) for _ in range(streams)]
    requests = [GenerationRequest(str(i), "m", prompt, params, _PATIENCE_S) for i, prompt in enumerate(prompts)]
    began = time.monotonic()
    members = [TokenStream(request, began) for request in requests]
    refusals = [refusal for refusal in engine.admit(members) if refusal is not None]
    if refusals:
        raise ConfigError(str(refusals[0]))
    times = await asyncio.gather(*(_times(stream) for stream in members))
    wall_s = max(one[-1] for one in times)
    gaps = [after - before for one in times for before, after in itertools.pairwise(one)]
    return Round(
        tokens_per_s=streams * arguments.output / wall_s,
        ttft_s=statistics.median(one[0] for one in times),
        tpot_s=statistics.median((one[-1] - one[0]) / max(1, len(one) - 1) for one in times),
        step_s=statistics.median(gaps or [wall_s]),
    )


async def _times(stream: TokenStream) -> list[float]:
    return [event.elapsed_s async for chunk in stream.chunks(0.0) for event in chunk.events]


def read_bandwidth() -> float:
    """Bytes a second of reading memory that no cache holds, the best of a few passes."""
    block = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return _READ_BYTES / best


if __name__ == "__main__":
    sys.exit(main())
