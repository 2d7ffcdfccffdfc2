"""The command line of `python -m perf.engines`, checked, with the defaults of the device filled in."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from perf.options import positive, seconds

Device = Literal["cpu", "cuda"]
SERVICE_VLLM, VLLM, SERVICE_NATIVE = "serve_app-vllm", "vllm", "serve_app-native"
SHIPPED, LLAMA = "serve_app", "llama.cpp"
SERVERS = (SERVICE_VLLM, VLLM, SERVICE_NATIVE)
KNOWN = (*SERVERS, SHIPPED, LLAMA)
# vLLM fills its KV cache in blocks, and the native engine reserves a whole context for each sequence on a GPU.
_KV_GIB: Mapping[Device, float] = MappingProxyType({"cpu": 1.0, "cuda": 8.0})

_DESCRIPTION = """\
Compares engines under load. Starts each server with the same weights and the same settings, waits until it answers,
warms it up, measures it with concurrent streams, and stops it. Prints the Markdown table for docs/benchmarks.md.

servers:
  serve_app-vllm    this service with engine.kind: vllm
  vllm              vllm serve
  serve_app-native  this service with engine.kind: native, without speculative decoding and quantization
  serve_app         this service as it is shipped: dtype and quantization by the processor, speculative decoding
  llama.cpp         the program llama-server, which must be in PATH, with the model's .gguf file
Every other name needs a --command.
"""

_EPILOG = """\
The servers are measured in turn, A B C A B C, because the speed of a machine changes over time. Ratios are those of the
first server to each other one. A ratio is computed within each round; the table has the median of the rounds.

--keep: all servers run at the same time, and only the measured one has requests. So the servers are measured one right
after the other at each number of streams, and each starts only once: on a CPU, vLLM takes more than a minute to start.
--no-keep: each server starts in each round and has the device alone. This is the default with a GPU, whose memory all
servers would have to share.

examples:
  python -m perf.engines                                    all servers at 1, 8, 32 and 128 streams
  python -m perf.engines --model meta-llama/Llama-3.1-8B-Instruct --kv-memory 16
  python -m perf.engines --servers serve_app-vllm,vllm      without the native engine
  python -m perf.engines --streams 1 8 --rounds 1 --duration 5s   a short trial
  python -m perf.engines --command 'vllm=/opt/vllm/bin/vllm serve {model} --port {port} --served-model-name model'
  python -m perf.engines --servers serve_app,llama.cpp --streams 1 8 32    as shipped against llama.cpp

exit codes: 0 success; 1 requests failed; 2 invalid arguments; 3 a server did not start or stopped answering; 4 the
client was the bottleneck, so the table does not describe the servers; 130 Ctrl-C. After 3 and 130, the windows that
were complete are printed and written.
"""


@dataclass(frozen=True)
class EngineSettings:
    """`commands` replaces the start command of a server. `kv_memory_gib` is the memory of each server's KV cache."""

    servers: tuple[str, ...]
    commands: Mapping[str, tuple[str, ...]]
    model: str
    device: Device
    dtype: str
    max_context: int
    kv_memory_gib: float
    eager: bool
    streams: tuple[int, ...]
    rounds: int
    duration_s: float
    prompt_words: int
    max_tokens: int
    keep: bool
    start_timeout_s: float
    output: Path

    @property
    def kv_memory_bytes(self) -> int:
        return round(self.kv_memory_gib * 2**30)

    @property
    def max_running(self) -> int:
        """The number of sequences that a server decodes together: one for each stream."""
        return max(self.streams)

    def to_results(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output), "commands": dict(self.commands)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.engines",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_servers(parser.add_argument_group("servers"))
    _add_load(parser.add_argument_group("load"))
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("perf-results/engines"),
        help="folder for engines.json, engines.md and the servers' logs (default: %(default)s)",
    )
    return parser


def _add_servers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--servers", type=_servers, default=SERVERS, metavar="NAME,...", help=f"default: {','.join(SERVERS)}"
    )
    group.add_argument(
        "--model",
        default="builtin:smollm2-135m",
        metavar="SOURCE",
        help="a folder, a .gguf file or a hub id, as the key `source` of the service's models; all servers load the "
        "same folder (default: the embedded model, %(default)s)",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is a GPU, else cpu"
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: bfloat16"
    )
    group.add_argument(
        "--max-context", type=positive, default=2048, metavar="N", help="prompt plus answer (default: 2048 tokens)"
    )
    group.add_argument(
        "--kv-memory", type=_gib, metavar="GIB", help="of the KV cache of each server (default: 8; on a CPU 1)"
    )
    group.add_argument(
        "--eager",
        action=argparse.BooleanOptionalAction,
        help="start vLLM without compilation and CUDA graphs (default: only on a CPU, where compilation takes minutes)",
    )
    group.add_argument(
        "--keep",
        action=argparse.BooleanOptionalAction,
        help="keep all servers running, or restart each in each round (default: keep on a CPU, restart with a GPU)",
    )
    group.add_argument(
        "--start-timeout",
        type=seconds,
        default=1800.0,
        metavar="TIME",
        help="limit for the start of a server (default: 30m)",
    )
    group.add_argument(
        "--command",
        action="append",
        type=_command,
        default=[],
        metavar="NAME=COMMAND",
        help="start the server NAME by this command, with {port}, {model} (the folder) and {gguf} (the .gguf file) "
        "filled in; the server must have OpenAI's completions and the model under the name `model`; may be repeated",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--streams", type=positive, nargs="+", metavar="N", default=[1, 8, 32, 128], help="default: 1 8 32 128"
    )
    group.add_argument("--rounds", type=positive, default=3, metavar="N", help="default: 3")
    group.add_argument(
        "--duration",
        type=seconds,
        default=20.0,
        metavar="TIME",
        help="requests that begin in this time are measured, after a warm-up of at most 20 s (default: 20s)",
    )
    group.add_argument(
        "--prompt-words", type=positive, default=60, metavar="N", help="length of the random prompts (default: 60)"
    )
    group.add_argument(
        "--max-tokens", type=positive, default=64, metavar="N", help="length of each answer (default: 64)"
    )


def settings(args: argparse.Namespace, gpus: Sequence[str], fail: Callable[[str], Any]) -> EngineSettings:
    """The settings on a machine with these GPUs. Calls `fail` with a sentence for options that contradict."""
    device: Device = args.device if args.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        fail("--device cuda: no NVIDIA GPU was found; see nvidia-smi")
    if args.prompt_words + args.max_tokens > args.max_context:
        fail("--prompt-words plus --max-tokens exceed --max-context; raise --max-context")
    commands = dict(args.command)
    if unused := sorted(commands.keys() - set(args.servers)):
        fail(f"--command {unused[0]}: add {unused[0]} to --servers")
    if unknown := [name for name in args.servers if name not in KNOWN and name not in commands]:
        fail(f"--servers {unknown[0]}: start it with --command '{unknown[0]}=...', or choose from {', '.join(KNOWN)}")
    return EngineSettings(
        servers=tuple(args.servers),
        commands=MappingProxyType(commands),
        model=args.model,
        device=device,
        dtype=args.dtype,
        max_context=args.max_context,
        kv_memory_gib=args.kv_memory or _KV_GIB[device],
        eager=args.eager if args.eager is not None else device == "cpu",
        streams=tuple(sorted(set(args.streams))),
        rounds=args.rounds,
        duration_s=args.duration,
        prompt_words=args.prompt_words,
        max_tokens=args.max_tokens,
        keep=args.keep if args.keep is not None else device == "cpu",
        start_timeout_s=args.start_timeout,
        output=args.output,
    )


def _servers(text: str) -> tuple[str, ...]:
    """In the order of the text, which is the order of the measurement."""
    return tuple(dict.fromkeys(_name(name.strip()) for name in text.split(",")))


def _name(text: str) -> str:
    """A name, which is part of file names."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a server")
    return text


def _command(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, command = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=COMMAND")
    if "{port}" not in command:
        raise argparse.ArgumentTypeError(f"{text!r}: the command needs {{port}}, the port to listen on")
    return _name(name), tuple(shlex.split(command))


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0")
    return value
