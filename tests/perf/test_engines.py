"""The comparison of engines: command line, configuration, order, table, and the end of all processes."""

from __future__ import annotations

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from perf import machine
from perf.engines.__main__ import main
from perf.engines.launch import LaunchError, ModelFiles, check_installed, launch, model_files
from perf.engines.results import EngineComparison, Start, TurnResult
from perf.engines.rounds import Turn, turns
from perf.engines.settings import (
    LLAMA,
    SERVERS,
    SERVICE_NATIVE,
    SERVICE_VLLM,
    SHIPPED,
    VLLM,
    EngineSettings,
    parser,
    settings,
)
from perf.engines.table import markdown
from perf.results import Load
from serve_app.config import NativeOptions, VllmOptions
from serve_app.serve_file import load_serve_file
from tests.perf.run_factory import run, stage

ROOT = Path(__file__).parents[2]
GPU = ("NVIDIA H200",)
MODEL = ModelFiles("/models/m", "/models/m.gguf")
QUICK = "--device cpu --streams 1 2 --rounds 1 --duration 0.1s --max-tokens 4"
# Starts a process in a session of its own, as daemons do, and never answers. The process ends like its parent, or
# ignores the end of its parent and SIGTERM.
HANGING = """
import os, subprocess, sys, time
waits = {
    "ends": "import sys; print(flush=True); sys.stdin.read()",
    "stays": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)",
}
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child = subprocess.Popen([sys.executable, "-c", waits[sys.argv[2]]], start_new_session=True, **pipes)
child.stdout.readline()
open(sys.argv[1] + ".part", "w").write(str(child.pid))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""


def chosen(line: str = "", gpus: tuple[str, ...] = ()) -> EngineSettings:
    options = parser()
    return settings(options.parse_args(shlex.split(line)), gpus, options.error)


def mock(name: str, *options: str) -> list[str]:
    words = [sys.executable, "-m", "perf.mock", "--port", "{port}", "--itl-ms", "1", *options]
    return ["--command", f"{name}={shlex.join(words)}"]


def hanging(name: str, folder: Path, child: str = "ends") -> list[str]:
    """A server that never answers. It writes the number of its child process to `folder`/child."""
    script = folder / "hanging.py"
    script.write_text(HANGING)
    return ["--command", f"{name}={shlex.join([sys.executable, str(script), str(folder / 'child'), child])} {{port}}"]


def test_defaults_fit_the_device() -> None:
    cpu, gpu = chosen(), chosen(gpus=GPU)
    assert (cpu.device, cpu.keep, cpu.eager, cpu.kv_memory_gib) == ("cpu", True, True, 1)
    assert (gpu.device, gpu.keep, gpu.eager, gpu.kv_memory_gib) == ("cuda", False, False, 8)
    assert gpu.servers == SERVERS
    assert (gpu.streams, gpu.max_running, gpu.rounds) == ((1, 8, 32, 128), 128, 3)
    other = chosen("--device cpu --no-keep --no-eager --kv-memory 0.5", GPU)
    assert (other.device, other.keep, other.eager, other.kv_memory_bytes) == ("cpu", False, False, 2**29)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--device cuda", "no NVIDIA GPU was found"),
        ("--servers vllm,llama", "--servers llama: start it with --command 'llama=...', or choose from serve_app-vllm"),
        ("--servers vllm,../x", "'../x' is no name of a server"),
        ("--max-tokens 2000", "raise --max-context"),
        ("--command 'vllm=vllm serve'", "needs {port}"),
        ("--command 'server {port}'", "write NAME=COMMAND"),
        ("--command 'llama=server {port}'", "add llama to --servers"),
        ("--servers vllm --command 'serve_app-native=server {port}'", "add serve_app-native to --servers"),
        ("--kv-memory 0", "not a number of GiB above 0"),
    ],
)
def test_wrong_option_has_a_sentence(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chosen(line)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_missing_package_is_named_with_its_remedies() -> None:
    with pytest.raises(LaunchError, match=r"pip install .*vllm.*--servers serve_app-native"):
        check_installed(chosen())
    check_installed(chosen("--servers serve_app-native"))
    check_installed(chosen("--servers vllm --command 'vllm=/opt/vllm/bin/vllm serve --port {port}'"))


@pytest.mark.parametrize("gpus", [(), GPU], ids=["cpu", "cuda"])
def test_service_accepts_its_configuration_and_vllm_has_the_same_settings(
    gpus: tuple[str, ...], tmp_path: Path
) -> None:
    options = chosen("--streams 1 128 --max-context 1024", gpus)
    for server, kind in ((SERVICE_VLLM, VllmOptions), (SERVICE_NATIVE, NativeOptions)):
        command = launch(server, options, MODEL, 20_001, tmp_path).command
        file = load_serve_file(command[command.index("--config") + 1])
        (model,) = file.application.args.models
        assert isinstance(model.engine, kind)
        assert (model.source, model.dtype, model.resources.num_gpus) == ("/models/m", "bfloat16", len(gpus))
        assert (model.engine.max_running, model.engine.max_context) == (128, 1024)
        assert model.engine.kv_memory_bytes == options.kv_memory_bytes
    words = launch(VLLM, options, MODEL, 20_001, tmp_path).command
    assert words[words.index("serve") + 1] == "/models/m"
    values = {"--max-num-seqs": 128, "--max-model-len": 1024, "--kv-cache-memory-bytes": options.kv_memory_bytes}
    assert {name: int(words[words.index(name) + 1]) for name in values} == values
    assert ("--enforce-eager" in words) == options.eager


def test_the_service_as_shipped_chooses_its_precision(tmp_path: Path) -> None:
    command = launch(SHIPPED, chosen("--servers serve_app --dtype float32"), MODEL, 20_001, tmp_path).command
    (model,) = load_serve_file(command[command.index("--config") + 1]).application.args.models
    assert isinstance(model.engine, NativeOptions)
    assert (model.dtype, model.quantization) == ("auto", "auto")
    assert model.engine.draft_tokens == NativeOptions().draft_tokens


def test_llama_has_as_many_sequences_and_as_much_context(tmp_path: Path) -> None:
    line = "--servers serve_app,llama.cpp --streams 1 32 --max-context 512"
    words = launch(LLAMA, chosen(line), MODEL, 20_001, tmp_path).command
    values = {"--model": "/models/m.gguf", "--port": "20001", "--parallel": "32", "--ctx-size": str(32 * 512)}
    assert {name: words[words.index(name) + 1] for name in values} == values


def test_a_missing_program_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match=r"llama-server, which is not in PATH.*--command 'llama.cpp="):
        check_installed(chosen("--servers llama.cpp"))


def test_another_server_gets_the_gguf_file_of_the_embedded_model(tmp_path: Path) -> None:
    options = chosen("--servers other --command 'other=server {gguf} {port}'")
    found = model_files(options)
    assert found.folder is None
    assert found.gguf is not None
    assert Path(found.gguf).suffix == ".gguf"
    assert launch("other", options, found, 20_001, tmp_path).command == ("server", found.gguf, "20001")


def test_a_folder_has_no_gguf_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="not available"):
        model_files(chosen(f"--servers llama.cpp --model {tmp_path}"))
    assert "is no .gguf file" in capfd.readouterr().err


def test_servers_that_run_together_divide_the_memory_of_the_gpu(tmp_path: Path) -> None:
    options = chosen("--keep", GPU)
    words = launch(VLLM, options, MODEL, 20_001, tmp_path).command
    share = float(words[words.index("--gpu-memory-utilization") + 1])
    launch(SERVICE_VLLM, options, MODEL, 20_001, tmp_path)
    (model,) = yaml.safe_load((tmp_path / "config.yaml").read_text())["applications"][0]["args"]["models"]
    assert model["engine"]["gpu_memory_utilization"] == share == 0.3


def test_servers_take_turns() -> None:
    kept = list(turns(2, "AB", (1, 8), keep=True))
    assert [(turn.round, turn.server, turn.streams) for turn in kept[:5]] == [
        (1, "A", (1,)),
        (1, "B", (1,)),
        (1, "A", (8,)),
        (1, "B", (8,)),
        (2, "A", (1,)),
    ]
    assert len(kept) == 8
    restarted = list(turns(2, "AB", (1, 8), keep=False))
    assert restarted == [Turn(number, server, (1, 8)) for number in (1, 2) for server in "AB"]


def comparison(*rounds: dict[str, Any]) -> EngineComparison:
    """One window of 8 streams for each server of each round, given by its stage."""
    measured = [
        TurnResult(round=number, server=server, run=run(one))
        for number, servers in enumerate(rounds, 1)
        for server, one in servers.items()
    ]
    starts = [Start(server=VLLM, round=number, seconds=seconds) for number, seconds in enumerate((70, 80, 120), 1)]
    return EngineComparison(
        started_at="2026-11-30T06:00:00Z",
        command=["python", "-m", "perf.engines"],
        commit="abc",
        settings=chosen("--streams 8").to_results(),
        machine=machine.describe(),
        versions={"vllm": "0.32.0"},
        starts=starts,
        idle_cpu={VLLM: 0.01},
        turns=measured,
    )


def test_ratio_is_computed_within_each_round() -> None:
    """The machine was twice as fast in the second round, and the third was interrupted."""
    found = comparison(
        {SERVICE_VLLM: stage([11.0], tokens_per_s=98), VLLM: stage([10.0], tokens_per_s=100)},
        {SERVICE_VLLM: stage([6.0], tokens_per_s=200), VLLM: stage([5.0], tokens_per_s=200)},
        {SERVICE_VLLM: stage([7.0], tokens_per_s=150)},
    )
    (gap,) = found.gaps()
    assert (gap.throughput.low, gap.throughput.median, gap.throughput.high) == pytest.approx((0.98, 0.99, 1))
    assert gap.ttft.median == 1
    assert [(row.server, row.tokens_per_s) for row in found.values()] == [(SERVICE_VLLM, 150), (VLLM, 150)]
    text = markdown(found)
    assert "| 8 | vllm | 150 | 7.50 / 7.50 | – | – |" in text.splitlines()
    row = "| 8 | vllm | 0.990 (0.980 to 1.000) | 1.150 (1.100 to 1.200) | +1.0 (+1.0 to +1.0) |"
    assert row in text.splitlines()
    assert "vllm 80 s" in text
    assert "Caution" not in text


def test_table_names_windows_that_describe_something_else() -> None:
    limited = stage([5.0], limited=["the client was slow"])
    found = comparison(
        {VLLM: stage([5.0], errors={"timeout": 2}), SERVICE_NATIVE: limited},
        {VLLM: stage([5.0]), SERVICE_NATIVE: limited},
    )
    text = markdown(found)
    assert "- Caution: vllm, 8 streams: 2 of 3 requests failed: timeout (round 1)" in text
    assert "- Caution: serve_app-native, 8 streams: client-limited: the client was slow (round 1, 2)" in text
    assert [(gap.server, gap.throughput.median) for gap in found.gaps()] == [(SERVICE_NATIVE, 1)]


def test_results_are_grouped_by_the_number_of_streams() -> None:
    one = stage([5.0], name="1 stream", load=Load(loop="closed", arrival="closed", concurrency=1), tokens_per_s=7)
    found = comparison({VLLM: one})
    assert [(row.streams, row.tokens_per_s) for row in found.values()] == [(1, 7)]


@pytest.fixture
def no_new_children() -> Iterator[None]:
    """The test ends all processes that it starts; services of other tests may run."""
    before = psutil.Process().children()
    yield
    assert [child for child in psutil.Process().children() if child not in before] == []


@pytest.mark.perf
@pytest.mark.parametrize("keep", ["--keep", pytest.param("--no-keep", marks=pytest.mark.long)])
@pytest.mark.usefixtures("no_new_children")
def test_one_command_measures_the_servers_and_ends_them(
    keep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{QUICK} {keep} --servers serve_app-vllm,vllm --output {tmp_path}"
    code = main([*shlex.split(line), *mock(SERVICE_VLLM, "--ttft-ms", "40"), *mock(VLLM, "--ttft-ms", "10")])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.strip() == (tmp_path / "engines.md").read_text().strip()
    found = EngineComparison.model_validate(json.loads((tmp_path / "engines.json").read_text()))
    assert [(row.streams, row.server) for row in found.values()] == [
        (streams, server) for streams in (1, 2) for server in (SERVICE_VLLM, VLLM)
    ]
    assert all(gap.throughput.high < 1 and gap.ttft.low > 10 for gap in found.gaps())
    assert [start.server for start in found.starts] == [SERVICE_VLLM, VLLM]
    assert bool(found.idle_cpu) == (keep == "--keep")


@pytest.mark.usefixtures("no_new_children")
def test_server_that_does_not_start_is_reported_with_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-c", "import sys; sys.exit('no memory for port {port}')"]
    line = f"{QUICK} --servers vllm,serve_app-native --output {tmp_path}"
    code = main([*shlex.split(line), *mock(VLLM), "--command", f"serve_app-native={shlex.join(words)}"])
    assert code == 3
    assert "serve_app-native ended with exit code 1:\n  no memory for port" in capsys.readouterr().err
    assert not (tmp_path / "engines.json").exists()


@pytest.mark.usefixtures("no_new_children")
def test_server_that_never_answers_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{QUICK} --servers vllm --start-timeout 0.1s --output {tmp_path}"
    assert main([*shlex.split(line), *hanging(VLLM, tmp_path)]) == 3
    assert "vllm did not answer within 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "keep", "child"), [(signal.SIGINT, "--keep", "stays"), (signal.SIGTERM, "--no-keep", "ends")]
)
def test_signal_during_a_start_ends_all_processes(
    number: signal.Signals, keep: str, child: str, tmp_path: Path
) -> None:
    """Without --keep, the first server was measured before the signal, and its results are kept."""
    line = f"{QUICK} {keep} --servers vllm,serve_app-native --output {tmp_path}"
    servers = [*mock(VLLM), *hanging(SERVICE_NATIVE, tmp_path, child)]
    command = [sys.executable, "-m", "perf.engines", *shlex.split(line), *servers]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "child").exists():
            assert process.poll() is None
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; all servers are stopped" in errors
    assert int((tmp_path / "child").read_text()) in {one.pid for one in started}
    assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    assert ("| 1 | vllm |" in out) == (keep == "--no-keep")
