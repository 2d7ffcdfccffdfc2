"""What an ingress knows of experiments: their configuration, the statistics of all ingresses, and the stops by guards.

Ingresses exchange their changes. Each keeps the latest statistics of every other one, and passes them on, so that the
statistics and stops of an ingress that has ended remain as long as one ingress runs.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b

from serve_app.config import ConfigError
from serve_app.experiment_config import Experiment, Experiments, template_text
from serve_app.gateway.assignment import exposure, flips
from serve_app.gateway.statistics import ExperimentStatistics, merged

# The ingresses whose statistics are kept, those that have ended included.
_MOST_INGRESSES = 64


@dataclass(frozen=True, slots=True)
class Active:
    """An experiment of the configuration. `identity` changes with what makes its statistics those of another one.

    `templates` has the sources of the chat templates by variant.
    """

    experiment: Experiment
    identity: str
    templates: dict[str, str]


@dataclass(frozen=True, slots=True)
class Stop:
    """A guard has stopped an experiment, at `at` (seconds since 1970)."""

    at: float
    experiment: str
    variant: str
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The statistics of one ingress by the identity of the experiment. A higher version is newer."""

    version: int
    statistics: dict[str, ExperimentStatistics]


@dataclass(frozen=True, slots=True)
class Changes:
    """What an ingress sends to another one. `accepted` is its configuration of experiments, None without one."""

    snapshots: dict[str, Snapshot]
    stops: dict[str, Stop]
    accepted: dict[str, object] | None = None


@dataclass
class ExperimentState:
    """The state in the ingress `ingress`. `error` says why the latest configuration was refused, or is ""."""

    ingress: str
    clock: Callable[[], float] = time.time
    active: dict[str, Active] = field(default_factory=dict)
    stops: dict[str, Stop] = field(default_factory=dict)
    accepted: Experiments | None = None
    error: str = ""
    _own: dict[str, ExperimentStatistics] = field(default_factory=dict)
    _version: int = 0
    _others: OrderedDict[str, Snapshot] = field(default_factory=OrderedDict)

    def configure(self, experiments: Experiments) -> None:
        """Replace the configuration. Raises ConfigError, and keeps the old one, if it cannot be used."""
        found = {experiment.name: _active(experiment) for experiment in experiments.experiments}
        for name, new in found.items():
            old = self.active.get(name)
            moves = flips(old.experiment, new.experiment) if old is not None and old.identity == new.identity else []
            if moves:
                pairs = ", ".join(f"{one} to {other}" for one, other in moves)
                raise ConfigError(f"user_config: {name} would move units from {pairs}; raise its revision to allow it")
        self.active, self.accepted = found, experiments
        identities = {one.identity for one in found.values()}
        self._own = {identity: kept for identity, kept in self._own.items() if identity in identities}
        self._version += 1

    def share(self, active: Active) -> float:
        """The part of their percent that the variants get now, from 0 to 1."""
        if active.identity in self.stops:
            return 0.0
        return exposure(active.experiment, datetime.fromtimestamp(self.clock(), UTC))

    def own(self, active: Active) -> ExperimentStatistics:
        """The statistics of this ingress, to be changed by the caller."""
        self._version += 1
        if active.identity not in self._own:
            self._own[active.identity] = ExperimentStatistics(self.clock())
        return self._own[active.identity]

    def statistics(self, active: Active) -> ExperimentStatistics:
        """A copy of the statistics of all ingresses."""
        parts = [self._own, *(other.statistics for other in self._others.values())]
        return merged(part[active.identity] for part in parts if active.identity in part)

    def measured(self) -> list[tuple[Active, ExperimentStatistics, str]]:
        """Each experiment with a copy of its statistics and the reason of its stop, "" without a stop."""
        stops = {identity: f"{stop.variant}: {stop.reason}" for identity, stop in self.stops.items()}
        return [(one, self.statistics(one), stops.get(one.identity, "")) for one in self.active.values()]

    def stop(self, active: Active, variant: str, reason: str) -> Stop | None:
        """Stop an experiment, and return the stop; None if it has been stopped or replaced meanwhile."""
        current = self.active.get(active.experiment.name)
        if active.identity in self.stops or current is None or current.identity != active.identity:
            return None
        self.stops[active.identity] = Stop(self.clock(), active.experiment.name, variant, reason)
        return self.stops[active.identity]

    def known(self) -> dict[str, int]:
        """The version that this ingress has of the statistics of each ingress."""
        return {self.ingress: self._version, **{name: one.version for name, one in self._others.items()}}

    def changes(self, known: Mapping[str, int]) -> Changes:
        """What an ingress that knows these versions does not know yet."""
        snapshots = {self.ingress: Snapshot(self._version, self._own), **self._others}
        new = {name: deepcopy(one) for name, one in snapshots.items() if one.version > known.get(name, -1)}
        accepted = None if self.accepted is None else self.accepted.model_dump(mode="json", exclude_unset=True)
        return Changes(new, dict(self.stops), accepted)

    def merge(self, changes: Changes) -> list[Stop]:
        """Take in the changes of another ingress; the order does not matter. Returns the stops that are new here."""
        for name, snapshot in changes.snapshots.items():
            known = self._others.get(name)
            if name != self.ingress and (known is None or known.version < snapshot.version):
                self._others[name] = snapshot
                self._others.move_to_end(name)
        while len(self._others) > _MOST_INGRESSES:
            self._others.popitem(last=False)
        new = {identity: stop for identity, stop in changes.stops.items() if identity not in self.stops}
        for identity, stop in changes.stops.items():
            self.stops[identity] = min(stop, self.stops.get(identity, stop), key=lambda one: (one.at, one.reason))
        return list(new.values())


def _active(experiment: Experiment) -> Active:
    """Raises ConfigError if a chat template cannot be read."""
    templates = {variant.name: template_text(variant) for variant in experiment.variants}
    variants = [variant.model_dump(mode="json", exclude={"percent"}) for variant in experiment.variants]
    facts = [experiment.name, experiment.revision, experiment.unit, variants, templates]
    return Active(experiment, blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest(), templates)
