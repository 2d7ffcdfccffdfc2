"""The machine that the client runs on: what it is, and how busy it was."""

from __future__ import annotations

import asyncio
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import psutil
import pynvml

from perf.results import Machine, Resources

_INTERVAL_S = 0.5
MIB = 2**20


def describe() -> Machine:
    return Machine(
        processor=_processor(),
        cores=len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else psutil.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=[str(pynvml.nvmlDeviceGetName(gpu)) for gpu in _gpus()],
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def commit() -> str | None:
    """Of the working copy that this file is in, `-dirty` if it differs; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@dataclass
class Watch:
    """Looks at the machine while it is entered."""

    cpu: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    gpu_memory: list[float] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._gpus = _gpus()
        psutil.cpu_percent()  # from here
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sample()
        self._task.cancel()

    def resources(self) -> Resources:
        """Means; of memory the most."""
        return Resources(
            cpu_percent=round(fmean(self.cpu), 1),
            memory_mib=round(max(self.memory)),
            gpu_percent=round(fmean(self.gpu), 1) if self.gpu else None,
            gpu_memory_mib=round(max(self.gpu_memory)) if self.gpu_memory else None,
        )

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self._sample()

    def _sample(self) -> None:
        self.cpu.append(psutil.cpu_percent())
        self.memory.append(psutil.virtual_memory().used / MIB)
        with suppress(pynvml.NVMLError):  # a part of a GPU does not tell its use
            self._sample_gpus()

    def _sample_gpus(self) -> None:
        if self._gpus:
            self.gpu.append(fmean(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in self._gpus))
            self.gpu_memory.append(sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in self._gpus) / MIB)


def _gpus() -> list[Any]:
    """NVIDIA's; none where there is no driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found is not None else platform.processor() or platform.machine()
