"""How each server is started: its command, its environment and, for this service, its configuration file."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perf.engines.settings import LLAMA, SERVICE_NATIVE, SERVICE_VLLM, SHIPPED, VLLM, EngineSettings

ROOT = Path(__file__).parents[2]
MODEL = "model"  # the name under which each server has the model
_NEEDS: dict[str, tuple[str, ...]] = {
    SERVICE_VLLM: ("serve_app", "ray", "vllm"),
    VLLM: ("vllm",),
    SERVICE_NATIVE: ("serve_app", "ray"),
    SHIPPED: ("serve_app", "ray"),
    LLAMA: (),
}
_LLAMA_PROGRAM = "llama-server"
_INSTALL = {"vllm": "pip install 'serve_app[vllm]'", "ray": "pip install -e .", "serve_app": "pip install -e ."}
_GPU_SHARE = 0.9


class LaunchError(Exception):
    """A server cannot be started or does not answer. The message gives the reason and what to do."""


@dataclass(frozen=True)
class Launch:
    """A command and the environment variables that it needs besides those of this process."""

    server: str
    port: int
    command: tuple[str, ...]
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def check_installed(settings: EngineSettings) -> None:
    """Raises LaunchError if a package or program of a chosen server is not installed."""
    for server in settings.servers:
        if server in settings.commands:
            continue
        if server == LLAMA and shutil.which(_LLAMA_PROGRAM) is None:
            raise LaunchError(
                f"{LLAMA} needs the program {_LLAMA_PROGRAM}, which is not in PATH: install llama.cpp, or start it "
                f"with --command '{LLAMA}=FOLDER/{_LLAMA_PROGRAM} -m {{gguf}} --port {{port}} --alias {MODEL}'"
            )
        for package in _NEEDS[server]:
            if importlib.util.find_spec(package) is None:
                raise LaunchError(
                    f"{server} needs the package {package}, which {sys.executable} does not have: {_INSTALL[package]}, "
                    f"start it from another environment with --command, or leave it out with --servers "
                    f"{_others(settings.servers, package) or 'and another server'}"
                )


def _others(servers: Iterable[str], package: str) -> str:
    return ",".join(server for server in servers if package not in _NEEDS[server])


@dataclass(frozen=True)
class ModelFiles:
    """The model as folder and as .gguf file, each None if no server needs it."""

    folder: str | None = None
    gguf: str | None = None


def model_files(settings: EngineSettings) -> ModelFiles:
    """The model's files, which all servers load. Raises LaunchError."""
    commands = [_template(server, settings) or ("{model}",) for server in settings.servers]
    words = " ".join(word for command in commands for word in command)
    return ModelFiles(
        folder=_found(settings.model) if "{model}" in words else None,
        gguf=_found(settings.model, "--gguf") if "{gguf}" in words else None,
    )


def _found(source: str, *options: str) -> str:
    environment = {**os.environ, **_with_this_package()}
    program = [sys.executable, "-m", "serve_app.engines.files", *options, source]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise LaunchError(f"--model {source}: its files are not available; the reason is printed above")
    return done.stdout.strip()


def launch(server: str, settings: EngineSettings, model: ModelFiles, port: int, folder: Path) -> Launch:
    """`folder` is an empty one for the files of this start."""
    if template := _template(server, settings):
        values = {"{port}": str(port), "{model}": model.folder or "", "{gguf}": model.gguf or ""}
        return Launch(server, port, tuple(_filled(word, values) for word in template), {})
    assert model.folder is not None, "model_files finds it for these servers"
    if server == VLLM:
        return Launch(server, port, _vllm_command(settings, model.folder, port), _vllm_environment(settings))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(service_config(server, settings, model.folder)))
    command = [sys.executable, "-m", "serve_app", "--config", str(config), "--port", str(port)]
    environment = {
        **_with_this_package(),
        **_vllm_environment(settings),
        # A Ray of its own. Ray makes sockets in its folder, whose paths have at most 107 characters.
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }
    return Launch(server, port, (*command, "--ray-address", "local", "--no-dashboard"), environment)


def service_config(server: str, settings: EngineSettings, model: str) -> dict[str, Any]:
    """This service's configuration file for one replica of the model."""
    engine: dict[str, Any] = {
        "max_running": settings.max_running,
        "max_waiting": settings.max_running,
        "max_context": settings.max_context,
        "kv_memory_bytes": settings.kv_memory_bytes,
    }
    model_options: dict[str, Any] = {"dtype": settings.dtype}
    if server == SERVICE_VLLM:
        engine |= {"kind": "vllm", "enforce_eager": settings.eager, "gpu_memory_utilization": _gpu_share(settings)}
    elif server == SHIPPED:
        model_options = {"dtype": "auto", "quantization": "auto"}
    else:
        # The same weights and the same number of computed tokens as in vLLM.
        engine |= {"kind": "native", "draft_tokens": 0}
        model_options |= {"quantization": "none", "device": settings.device}
    requests = max(32, 2 * settings.max_running)
    entry = {
        "name": MODEL,
        "source": model,
        "resources": {"num_cpus": 1, "num_gpus": int(settings.device == "cuda")},
        "engine": engine,
        "deployment": {
            "num_replicas": 1,
            "max_ongoing_requests": requests,
            "max_queued_requests": requests,
            "health_check_timeout_s": 120,
            "graceful_shutdown_wait_loop_s": 0.5,
            "graceful_shutdown_timeout_s": 60,
        },
        **model_options,
    }
    application = {"name": "serve_app", "route_prefix": "/", "import_path": "serve_app.app:build"}
    return {
        "http_options": {"host": "127.0.0.1"},
        "applications": [{**application, "args": {"models": [entry]}}],
    }


def _template(server: str, settings: EngineSettings) -> tuple[str, ...] | None:
    """The command of a server with its placeholders; None if `launch` makes the command."""
    return settings.commands.get(server) or (_llama_command(settings) if server == LLAMA else None)


def _llama_command(settings: EngineSettings) -> tuple[str, ...]:
    """llama-server divides its context among the sequences. On a GPU it computes all layers."""
    options = {
        "--model": "{gguf}",
        "--alias": MODEL,
        "--host": "127.0.0.1",
        "--port": "{port}",
        "--parallel": settings.max_running,
        "--ctx-size": settings.max_running * settings.max_context,
        "--threads": len(os.sched_getaffinity(0)),
        "--n-gpu-layers": 999 if settings.device == "cuda" else 0,
    }
    return (_LLAMA_PROGRAM, *(str(word) for option in options.items() for word in option))


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _vllm_command(settings: EngineSettings, model: str, port: int) -> tuple[str, ...]:
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": MODEL,
        "--dtype": settings.dtype,
        "--max-model-len": settings.max_context,
        "--max-num-seqs": settings.max_running,
        "--kv-cache-memory-bytes": settings.kv_memory_bytes,
        "--gpu-memory-utilization": _gpu_share(settings),
        "--generation-config": "vllm",
    }
    words = [str(word) for option in options.items() for word in option]
    eager = ["--enforce-eager"] if settings.eager else []
    return (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *words, *eager)


def _vllm_environment(settings: EngineSettings) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if settings.device == "cpu" else {}
    return {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **hidden}


def _gpu_share(settings: EngineSettings) -> float:
    """The share of the GPU's memory that a server may use: servers that run at the same time divide it."""
    return round(_GPU_SHARE / (len(settings.servers) if settings.keep else 1), 3)


def _with_this_package() -> dict[str, str]:
    """The environment in which `python -m serve_app` runs the service beside this file from every folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
