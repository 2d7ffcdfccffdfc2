"""What a description would make: the program of its cloud, recorded."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra_pulumi import base, catalogue as catalogues
from infra_pulumi.catalogue import Catalogue
from infra_pulumi.rayservice import read_config
from infra_pulumi.record import Recording, RecordingMonitor, export, record
from infra_pulumi.spec import ClusterSpec


def evaluate(spec: ClusterSpec, catalogue: Catalogue | None = None) -> Recording:
    """Needs no cloud, no credentials and no Pulumi CLI. Raises SpecError for machines that cannot be."""
    known = catalogue or catalogues.load()
    catalogues.check(spec, known)
    with _without_collection():
        promised = importlib.import_module(f"infra_pulumi.{spec.provider}").promised
        return record(lambda: program(spec, known, "${month}"), spec.name, RecordingMonitor(promised))


@contextmanager
def _without_collection() -> Iterator[None]:
    """A cloud's SDK is half a million objects that stay; to look for garbage among them takes longer than the plan."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def program(spec: ClusterSpec, catalogue: Catalogue, month: str, folder: Path = Path()) -> None:
    """The Pulumi program itself, the same under the engine and under the recorder.

    A relative path of the service's config is meant from `folder`. Raises SpecError if it is no config.
    """
    cluster = base.build(spec, catalogue, month)
    if spec.addons.by_pulumi:  # whose SDK is an extra
        addons = importlib.import_module("infra_pulumi.addons")
        addons.Addons(cluster, read_config(folder / spec.serve.config))
    export(cluster.outputs.plain())
