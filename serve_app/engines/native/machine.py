"""The memory, the cores and the instruction sets that this process may use, by the limits of machine and cgroups."""

from __future__ import annotations

import ctypes
import gc
import math
import os
from pathlib import Path

from serve_app.config import NativeOptions
from serve_app.engines.native.isa import visible

_PROC_MEMINFO = Path("/proc/meminfo")
_PROC_CPUINFO = Path("/proc/cpuinfo")
_PROC_CGROUP = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class NotEnoughMemory(Exception):
    """The KV cache cannot hold a single sequence."""


def available_bytes(meminfo: Path = _PROC_MEMINFO, cgroup: Path = _CGROUP, own: Path = _PROC_CGROUP) -> int:
    """Bytes that this process can allocate without swapping: the least that the machine and each cgroup leave.

    Reads cgroup v2 (`memory.max`, `memory.current`) and v1 (`memory.limit_in_bytes`, `memory.usage_in_bytes`) of the
    process's own cgroup and of its ancestors. Reclaimable page cache counts as free, as in MemAvailable.
    """
    free = _meminfo_available(meminfo)
    groups = _own_groups(own)
    for top, path, limit_name, usage_name, cache_key in (
        (cgroup, groups.get("", ""), "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", groups.get("memory", ""), *_V1_NAMES),
    ):
        for folder in _hierarchy(top, path):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                free = min(free, limit - usage + _stat(folder / "memory.stat", cache_key))
    return max(free, 0)


def usable_cores(cgroup: Path = _CGROUP, own: Path = _PROC_CGROUP) -> int:
    """Number of cores that this process may run on: its CPU affinity, bounded by the CPU quota of its cgroups.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`, `cpu.cfs_period_us`). With more threads than the quota
    covers, the kernel would suspend all threads for the rest of every period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = _own_groups(own)
    for folder in _hierarchy(cgroup, groups.get("", "")):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        cores = _bounded(cores, quota, period)
    for folder in _hierarchy(cgroup / "cpu", groups.get("cpu", "")):
        cores = _bounded(cores, _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))
    return cores


def processor_flags(cpuinfo: Path = _PROC_CPUINFO) -> frozenset[str]:
    """Instruction sets of the processor by Linux's names (`avx512_vnni`), up to the level of SERVE_APP_ISA.

    Empty where /proc/cpuinfo lists none. Raises UnknownIsa.
    """
    lines = (line.partition(":") for line in _text(cpuinfo).splitlines())
    flags = next((flags for name, _, flags in lines if name.strip() in ("flags", "Features")), "")
    return visible(set(flags.split()))


def return_memory() -> None:
    """Return the memory of loading and converting to the system; otherwise glibc keeps it (here over 400 MB)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_step_memory() -> None:
    """Let glibc keep the memory of a step's intermediate results for the next step.

    By default it may map larger results for each call and unmap them, so that each of their pages is zeroed again: a
    product of 1,024 rows with 3,072 outputs then took 8.5 ms instead of 3.9 (2 cores of a Sapphire Rapids). The values
    are from mallopt(3): the largest threshold that glibc accepts, and eight results of that size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _bounded(cores: int, quota: str, period: str) -> int:
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return cores
    return max(1, min(cores, math.floor(int(quota) / int(period))))


def kv_tokens_that_fit(engine: NativeOptions, free_bytes: int, token_bytes: int, longest: int) -> int:
    """Number of tokens whose keys and values, `token_bytes` each, fit into the memory budget.

    Raises NotEnoughMemory, with the numbers and the settings to change, when fewer than `longest` tokens fit.
    """
    budget = engine.kv_memory_bytes or int(free_bytes * engine.kv_memory_fraction)
    tokens = budget // token_bytes
    if tokens < longest:
        free = "" if engine.kv_memory_bytes else f" ({_mib(free_bytes)} free)"
        raise NotEnoughMemory(
            f"one sequence of {longest} tokens needs {_mib(longest * token_bytes)} of KV memory, the budget is "
            f"{_mib(budget)}{free}; lower engine.max_context, or raise "
            f"engine.kv_memory_fraction or engine.kv_memory_bytes"
        )
    return tokens


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _meminfo_available(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise NotEnoughMemory(f"{path} has no MemAvailable line; set engine.kv_memory_bytes")


def _own_groups(path: Path) -> dict[str, str]:
    """This process's cgroup by controller, "" for cgroup v2. The file has lines like `4:memory:/a/b` and `0::/a/b`."""
    try:
        fields = [line.split(":", 2) for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {controller: group for _, controllers, group in fields for controller in controllers.split(",")}


def _hierarchy(top: Path, group: str) -> list[Path]:
    """The folders from `top` down to a cgroup; only `top` when the cgroup lies outside of the mounted hierarchy."""
    parts = [part for part in group.split("/") if part]
    if ".." in parts:
        parts = []
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """The content of a file without white space at its ends; "" when it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
