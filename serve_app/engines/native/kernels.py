"""The native operations of kernels.cpp: built once where they run, and kept by processor, torch and source."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock

from serve_app.config import cache_dir
from serve_app.engines.native.loader import Report

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.cpp")
_INCLUDED = Path(__file__).with_name("matmul.h")
# No -ffast-math: it would make the whole process flush denormals. ABI notes about vectors do not matter within a file.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
_MATH_FLAGS = ("-fno-math-errno", "-fno-trapping-math")
_BUILD_S = 300
_BUILD_ALLOWED = "SERVE_APP_NATIVE_KERNELS"


def available(report: Report) -> bool:
    """Whether `torch.ops.serve_app` holds the operations, after building and loading them if that is possible.

    They are not where there is no C++ compiler, on other systems than Linux, or with SERVE_APP_NATIVE_KERNELS=0.
    """
    if hasattr(torch.ops.serve_app, "attend"):
        return True
    try:
        torch.ops.load_library(_built(report))  # type: ignore[no-untyped-call]
    except (OSError, subprocess.SubprocessError, _Unavailable) as error:
        logger.warning("native kernels are not used, steps are slower: %s", error)
        return False
    return True


def begin() -> None:
    """Have them built, if they are to be, by another process while a model is read; `available` waits for it."""

    def build() -> None:
        with suppress(OSError, subprocess.SubprocessError, _Unavailable):  # `available` tries again, and says why
            _built(lambda stage: None)

    threading.Thread(target=build, name="kernels", daemon=True).start()


class _Unavailable(Exception):
    pass


def _built(report: Report, root: Path | None = None) -> Path:
    """The library's file. It appears whole or not at all, and of two processes that want it one builds."""
    if os.environ.get(_BUILD_ALLOWED) == "0" or platform.system() != "Linux":
        raise _Unavailable(f"{_BUILD_ALLOWED}=0" if platform.system() == "Linux" else platform.system())
    target = (root or cache_dir() / "kernels") / f"{_key()}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    report("compiling for this processor (once)")
    with FileLock(f"{target}.lock"):
        if not target.exists():
            part = target.with_suffix(".part")
            _compile(part)
            part.replace(target)
    return target


def _key() -> str:
    """Of everything that the machine code depends on: -march=native reads the processor's flags."""
    described = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    processor = [line for line in described.splitlines() if line.startswith(("model name", "flags", "Features"))]
    parts = [
        _SOURCE.read_text(),
        _INCLUDED.read_text(),
        torch.__version__,
        *_FLAGS,
        *_MATH_FLAGS,
        platform.machine(),
        *processor,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(target: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise _Unavailable("no C++ compiler (install g++, or set CXX)")
    home = Path(torch.__file__).parent
    # torch's own OpenMP by its path: a second one in the process would mean a second pool of threads.
    openmp = [str(path) for path in sorted((home / "lib").glob("libgomp*.so*"))[:1]]
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    libraries = ["-Wl,--as-needed", *openmp, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [compiler, *_FLAGS, *_MATH_FLAGS, *includes, str(_SOURCE), "-o", str(target), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False)
    if done.returncode != 0:
        raise _Unavailable(f"{compiler} failed: {done.stderr[-500:]}")
