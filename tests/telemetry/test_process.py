"""The metrics of a process, and of GPUs that a substitute for the NVML library describes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.process import ProcessMetrics

# Two GPUs with 8 GiB. The second one does not report its utilization, like a MIG instance.
NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned int gpu, memory; } use;
static int gpus[2] = {0, 1};
static const char *names[2] = {"GPU-aaaa", "GPU-bbbb"};
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, int **gpu) {
  if (index > 1) return 2;
  *gpu = &gpus[index];
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char *name, int **gpu) {
  for (int i = 0; i < 2; i++) if (!strcmp(name, names[i])) { *gpu = &gpus[i]; return 0; }
  return 6;
}
int nvmlDeviceGetUUID(int *gpu, char *text, unsigned int size) { strncpy(text, names[*gpu], size); return 0; }
int nvmlDeviceGetMemoryInfo(int *gpu, memory *m) {
  m->total = 8ull << 30; m->used = (unsigned long long)(*gpu + 1) << 30; m->free = m->total - m->used;
  return 0;
}
int nvmlDeviceGetUtilizationRates(int *gpu, use *u) {
  if (*gpu == 1) return 3;
  u->gpu = 75; u->memory = 10;
  return 0;
}
const char *nvmlErrorString(int code) { return "not supported"; }
"""
PROGRAM = (
    "from serve_app.telemetry.exposition import exposition\n"
    "from serve_app.telemetry.process import Gpus\n"
    "print(exposition([], Gpus('m', 'r').families()).decode())\n"
)


def test_a_process_reports_its_resources_and_versions() -> None:
    text = exposition([], ProcessMetrics("m", "r").families(0.25)).decode()
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert f'{name}{{model="m",replica="r"}} ' in text
    assert 'serve_app_event_loop_lag_seconds{model="m",replica="r"} 0.25' in text
    assert 'serve_app_build_info{model="m",python="3.' in text
    assert 'ray="2.60.0"' in text
    assert 'serve_app_event_loop_tasks{model="m",replica="r"} 0.0' in text, "no event loop runs"
    assert "gpu" not in text


async def test_a_process_reports_the_tasks_of_its_event_loop() -> None:
    others = [asyncio.create_task(asyncio.sleep(10)) for _ in range(3)]
    text = exposition([], ProcessMetrics("m", "r").families(0.25)).decode()
    assert 'serve_app_event_loop_tasks{model="m",replica="r"} 4.0' in text, "with this test"
    for task in others:
        task.cancel()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    assert compiler is not None, "no C compiler found; the native operations of the engine need one too"
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(NVML)
    built = folder / "libnvidia-ml.so.1"
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-o", str(built), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return folder


def measured_gpus(library: Path, visible: str | None) -> list[str]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    lines = (line for line in done.stdout.splitlines() if line and not line.startswith("#"))
    return sorted(f"{line.split('{')[0]} {line.split('gpu=')[1][1:9]} {line.split()[-1]}" for line in lines)


FIRST = [
    "serve_app_gpu_memory_total_bytes GPU-aaaa 8.589934592e+09",
    "serve_app_gpu_memory_used_bytes GPU-aaaa 1.073741824e+09",
    "serve_app_gpu_utilization_ratio GPU-aaaa 0.75",
]
SECOND = [
    "serve_app_gpu_memory_total_bytes GPU-bbbb 8.589934592e+09",
    "serve_app_gpu_memory_used_bytes GPU-bbbb 2.147483648e+09",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, FIRST + SECOND), ("1", SECOND), ("GPU-aaaa", FIRST), ("0, GPU-bbbb", FIRST + SECOND), ("", []), ("7", [])],
)
def test_the_gpus_that_are_visible_to_the_process_are_measured(
    library: Path, visible: str | None, expected: list[str]
) -> None:
    assert measured_gpus(library, visible) == sorted(expected)
