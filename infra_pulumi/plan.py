"""Evaluates a cluster description: runs its Pulumi program with a monitor that only records its requests."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra_pulumi import base, catalogue as catalogues
from infra_pulumi.catalogue import Catalogue
from infra_pulumi.record import Recording, RecordingMonitor, export, record
from infra_pulumi.serve_config import read_config
from infra_pulumi.spec import ClusterSpec


def evaluate(spec: ClusterSpec, catalogue: Catalogue | None = None) -> Recording:
    """Record the description's resources without a cloud, credentials or Pulumi's CLI. Raises SpecError."""
    machines = catalogue or catalogues.load()
    catalogues.check(spec, machines)
    with _paused_garbage_collection():
        computed_outputs = importlib.import_module(f"infra_pulumi.{spec.provider}").computed_outputs
        return record(lambda: program(spec, machines, "${month}"), spec.name, RecordingMonitor(computed_outputs))


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: an SDK has half a million live objects, and scanning them outlasts the plan."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def program(spec: ClusterSpec, catalogue: Catalogue, month: str, folder: Path = Path()) -> None:
    """The Pulumi program, which both Pulumi's engine and the recording monitor run.

    A relative `serve.config` is resolved against `folder`. Raises SpecError if that file is not a valid config.
    """
    cluster = base.build(spec, catalogue, month)
    if spec.addons.by_pulumi:  # imported here, because its SDK is optional
        addons = importlib.import_module("infra_pulumi.addons")
        addons.Addons(cluster, read_config(folder / spec.serve.config))
    export(cluster.outputs.as_dict())
