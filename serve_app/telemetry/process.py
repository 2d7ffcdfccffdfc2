"""What a process takes of its machine: time, memory, files, and the GPUs that it sees."""

from __future__ import annotations

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

from serve_app.telemetry.metrics import build, gpu, lag

logger = logging.getLogger("ray.serve")


class ProcessMetrics:
    """prometheus-client's figures of this process, with labels that tell it from others, and NVML's of its GPUs.

    `model` is "" for an ingress.
    """

    def __init__(self, model: str, replica: str) -> None:
        self._labels = {"model": model, "replica": replica}
        self._process = ProcessCollector(registry=CollectorRegistry())
        self._build = build(model, replica)
        self._gpus = Gpus(model, replica)

    def families(self, lag_s: float) -> list[Metric]:
        families = [self._labelled(family) for family in self._process.collect()]
        late = lag(self._labels["model"], self._labels["replica"], lag_s)
        return [*families, self._build, late, *self._gpus.families()]

    def _labelled(self, family: Metric) -> Metric:
        family.samples = [sample._replace(labels=self._labels) for sample in family.samples]
        return family


class Gpus:
    """The GPUs that this process sees, by NVML. There are none without its library, a driver or a GPU."""

    def __init__(self, model: str, replica: str) -> None:
        self._labels = [model, replica, socket.gethostname()]
        self._nvml = _nvml()
        self._handles = [] if self._nvml is None else list(_visible(self._nvml))

    def families(self) -> list[GaugeMetricFamily]:
        families = gpu()
        for uuid, handle in self._handles:
            for family, value in zip(families.values(), self._look(handle), strict=True):
                if value is not None:
                    family.add_metric([*self._labels, uuid], value)
        return [family for family in families.values() if family.samples]

    def _look(self, handle: Any) -> tuple[float | None, float | None, float | None]:
        """Bytes in use, all bytes, utilisation from 0 to 1; None what this GPU does not tell."""
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
    """UUID and handle of the GPUs that CUDA_VISIBLE_DEVICES names, by number or by UUID; without it, of all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(nvml.nvmlDeviceGetCount())) if named is None else named.split(",")
    for name in filter(None, map(str.strip, names)):
        try:
            by_number = name.isdecimal()
            find = nvml.nvmlDeviceGetHandleByIndex if by_number else nvml.nvmlDeviceGetHandleByUUID
            handle = find(int(name) if by_number else name)
            yield nvml.nvmlDeviceGetUUID(handle), handle
        except nvml.NVMLError as error:
            logger.warning("GPU %s is not measured: %s", name, error)
