"""Measures the CPU time, memory and open files of a process, and the GPUs that are visible to it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from serve_app.telemetry.metrics import build, gpu, lag, loop_tasks

logger = logging.getLogger("ray.serve")


class ProcessMetrics:
    """The process metrics of prometheus-client with the labels `model` and `replica`, and the GPU metrics of NVML.

    `model` is "" for an ingress.
    """

    def __init__(self, model: str, replica: str) -> None:
        self._labels = {"model": model, "replica": replica}
        self._process = ProcessCollector(registry=CollectorRegistry())
        self._build = build(model, replica)
        self._gpus = Gpus(model, replica)

    def families(self, lag_s: float) -> list[Metric]:
        """All metric families. `lag_s` is the delay of the event loop in seconds, in which this is called."""
        families = [self._labelled(family) for family in self._process.collect()]
        loop = [lag(**self._labels, seconds=lag_s), loop_tasks(**self._labels, count=_tasks())]
        return [*families, self._build, *loop, *self._gpus.families()]

    def _labelled(self, family: Metric) -> Metric:
        family.samples = [sample._replace(labels=self._labels) for sample in family.samples]
        return family


def _tasks() -> int:
    """The tasks of the running event loop; 0 without one."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


class Gpus:
    """The GPUs that are visible to this process, measured by NVML. Empty without NVML, a driver or a GPU."""

    def __init__(self, model: str, replica: str) -> None:
        self._labels = [model, replica, socket.gethostname()]
        self._nvml = _nvml()
        self._handles = [] if self._nvml is None else list(_visible(self._nvml))

    def families(self) -> list[GaugeMetricFamily]:
        families = gpu()
        for uuid, handle in self._handles:
            for family, value in zip(families.values(), self._measure(handle), strict=True):
                if value is not None:
                    family.add_metric([*self._labels, uuid], value)
        return [family for family in families.values() if family.samples]

    def _measure(self, handle: Any) -> tuple[float | None, float | None, float | None]:
        """Memory in use and total memory in bytes, utilization from 0 to 1; None if the GPU does not report a value."""
        nvml = self._nvml
        assert nvml is not None
        used = total = busy = None
        with suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            used, total = float(memory.used), float(memory.total)
        with suppress(nvml.NVMLError):
            busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return used, total, busy


def _nvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml  # type: ignore[no-any-return]


def _visible(nvml: ModuleType) -> Iterator[tuple[str, Any]]:
    """UUID and handle of each GPU in CUDA_VISIBLE_DEVICES, which has numbers or UUIDs; of all GPUs if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(nvml.nvmlDeviceGetCount())) if visible is None else visible.split(",")
    for name in filter(None, map(str.strip, names)):
        try:
            by_number = name.isdecimal()
            find = nvml.nvmlDeviceGetHandleByIndex if by_number else nvml.nvmlDeviceGetHandleByUUID
            handle = find(int(name) if by_number else name)
            yield nvml.nvmlDeviceGetUUID(handle), handle
        except nvml.NVMLError as error:
            logger.warning("cannot measure GPU %s: %s", name, error)
