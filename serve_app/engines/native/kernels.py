"""The native operations: C++ that is compiled once per processor, version of torch and source, then loaded."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import torch

from serve_app.engines.files.disk_cache import CacheError, Report, Work, cache_subfolder, cached_file
from serve_app.engines.native.isa import held_to

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("kernels.cpp", "matmul.cpp", "attention.cpp"))
# No -ffast-math: it makes the whole process flush denormals. ABI notes about vectors do not matter within one library.
_FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-Wno-psabi")
_MATH_FLAGS = ("-fno-math-errno", "-fno-trapping-math")
_BUILD_TIMEOUT_S = 300
_POLL_S = 0.1
_BUILD_ALLOWED = "SERVE_APP_NATIVE_KERNELS"


class Unavailable(Exception):
    """The operations cannot be compiled on this machine; the message is the reason."""


_FAILURES = (OSError, subprocess.SubprocessError, CacheError, Unavailable)


class _Build(threading.Thread):
    """A build in the background. `stage` is its latest report."""

    def __init__(self) -> None:
        super().__init__(name="kernels", daemon=True)
        self.stage = ""
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            build(self._report)
        except _FAILURES as error:
            self.error = error

    def wait(self, report: Report) -> None:
        """Wait for the end and pass on each stage. Raises what the build raised."""
        reported = ""
        while self.is_alive():
            if self.stage != reported:
                reported = self.stage
                report(reported)
            self.join(_POLL_S)
        if self.error is not None:
            raise self.error

    def _report(self, stage: str) -> None:
        self.stage = stage


_background: _Build | None = None


def start_build() -> None:
    """Compile the operations, if necessary, in the background while a model loads; `available` waits for it."""
    global _background
    _background = _Build()
    _background.start()


def expected() -> bool:
    """Whether `available` will be true, unless the compiler fails. Raises UnknownIsa."""
    if os.environ.get(_BUILD_ALLOWED) == "0" or platform.system() != "Linux":
        return False
    return _compiler() is not None or (cache_subfolder("kernels") / f"{key()}.so").exists()


def available(report: Report) -> bool:
    """Whether `torch.ops.serve_app` has the operations; compiles and loads them if possible.

    They are not available without a C++ compiler, on systems other than Linux, or with SERVE_APP_NATIVE_KERNELS=0.
    """
    global _background
    if hasattr(torch.ops.serve_app, "attend"):
        return True
    running, _background = _background, None
    try:
        if running is not None:
            running.wait(report)
        torch.ops.load_library(build(report))  # type: ignore[no-untyped-call]
    except _FAILURES as error:
        logger.warning("native kernels are not used, steps are slower: %s", error)
        return False
    return True


def build(report: Report, root: Path | None = None) -> Path:
    """The compiled library below `root`, by default in the user's cache folder. A damaged library is compiled again.

    Raises Unavailable, CacheError, OSError or SubprocessError.
    """
    if os.environ.get(_BUILD_ALLOWED) == "0":
        raise Unavailable(f"{_BUILD_ALLOWED}=0")
    if platform.system() != "Linux":
        raise Unavailable(f"they are not supported on {platform.system()}")
    work = Work(_compile, "compiling for this processor", "compiles the native operations", 1.2 * _BUILD_TIMEOUT_S)
    return cached_file((root or cache_subfolder("kernels")) / f"{key()}.so", work, report)


def key() -> str:
    """A hash of everything that the machine code depends on: -march=native depends on the processor's flags.

    Raises UnknownIsa.
    """
    described = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    processor = [line for line in described.splitlines() if line.startswith(("model name", "flags", "Features"))]
    parts = [
        *(path.read_text() for path in (*_SOURCES, *sorted(_FOLDER.glob("*.h")))),
        torch.__version__,
        *_FLAGS,
        _march(),
        *_MATH_FLAGS,
        platform.machine(),
        *processor,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _march() -> str:
    isa = held_to()
    return f"-march={'native' if isa is None else isa.march}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _compile(target: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise Unavailable("no C++ compiler (install g++, or set CXX)")
    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    # The path of torch's own OpenMP: a second OpenMP in the process would have a second thread pool.
    openmp = [str(path) for path in sorted((home / "lib").glob("libgomp*.so*"))[:1]]
    libraries = ["-Wl,--as-needed", *openmp, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(prefix="serve_app-kernels-") as folder:
        objects = {str(source): str(Path(folder) / f"{source.stem}.o") for source in _SOURCES}
        flags = [*_FLAGS, _march(), *_MATH_FLAGS, *includes]
        _run(*([compiler, *flags, "-c", source, "-o", made] for source, made in objects.items()))
        _run([compiler, "-shared", "-fopenmp", *objects.values(), "-o", str(target), *libraries])


def _run(*commands: list[str]) -> None:
    """Run commands at the same time. Raises Unavailable, OSError or SubprocessError."""
    with ExitStack() as ending:
        running: list[subprocess.Popen[str]] = []
        for command in commands:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            running.append(ending.enter_context(process))
            ending.callback(process.kill)
        for process in running:
            _, errors = process.communicate(timeout=_BUILD_TIMEOUT_S)
            if process.returncode != 0:
                raise Unavailable(f"{commands[0][0]} failed: {errors[-500:]}")
