"""What one simulation has recorded."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from perf.simulate.replica import Request


@dataclass(frozen=True, slots=True)
class Sample:
    """The service at one moment. `waiting` requests have no first token; `paid` replicas start, serve or drain."""

    at: float
    ready: int
    paid: int
    target: int
    waiting: int
    open: int


@dataclass(slots=True)
class Outcome:
    """What happened. `decisions` are the times and the targets of all changes of the number of replicas.

    `routing_s`, `decision_s` and `cpu_s` are processor times on this machine. `most_running` is the highest number of
    sequences that one replica has computed together.
    """

    requests: list[Request] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    decisions: list[tuple[float, int]] = field(default_factory=list)
    first_target: int = 0
    routing_s: array[float] = field(default_factory=lambda: array("d"))
    decision_s: array[float] = field(default_factory=lambda: array("d"))
    replica_s: float = 0.0
    lost_replicas: int = 0
    resumed: int = 0
    most_running: int = 0
    cpu_s: float = 0.0
