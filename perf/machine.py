"""The client's machine: its hardware, the commit of the working copy, and resource use during a measurement."""

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
    """Commit of the working copy that holds this file, with `-dirty` if it has changes; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@dataclass
class ResourceMonitor:
    """Samples the machine's resource use every 0.5 s inside its context."""

    cpu: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    gpu_memory: list[float] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._gpus = _gpus()
        psutil.cpu_percent()  # the next call measures from here
        self._task = asyncio.create_task(self._sample_repeatedly())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sample()
        self._task.cancel()

    def resources(self) -> Resources:
        """Means; for memory the maximum."""
        return Resources(
            cpu_percent=round(fmean(self.cpu), 1),
            memory_mib=round(max(self.memory)),
            gpu_percent=round(fmean(self.gpu), 1) if self.gpu else None,
            gpu_memory_mib=round(max(self.gpu_memory)) if self.gpu_memory else None,
        )

    async def _sample_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self._sample()

    def _sample(self) -> None:
        self.cpu.append(psutil.cpu_percent())
        self.memory.append(psutil.virtual_memory().used / MIB)
        with suppress(pynvml.NVMLError):  # a MIG slice does not report its utilisation
            self._sample_gpus()

    def _sample_gpus(self) -> None:
        if self._gpus:
            self.gpu.append(fmean(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in self._gpus))
            self.gpu_memory.append(sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in self._gpus) / MIB)


def _gpus() -> list[Any]:
    """Handles of the NVIDIA GPUs; empty without a driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match is not None else platform.processor() or platform.machine()
