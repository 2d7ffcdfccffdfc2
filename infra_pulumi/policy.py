"""What a cluster must not be. Rules are functions over what was recorded: they look, and name what is wrong.

A rule yields a sentence for each resource that breaks it. `error` stops a deployment, `warning` does not.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from infra_pulumi.record import Recording, Resource
from infra_pulumi.spec import ClusterSpec

Severity: TypeAlias = Literal["error", "warning"]
Broken: TypeAlias = Iterator[tuple[str, str]]  # the resource's name, and what is wrong with it
Check: TypeAlias = Callable[[Recording, ClusterSpec], Broken]


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    severity: Severity
    why: str
    remedy: str
    check: Check


@dataclass(frozen=True, slots=True)
class Finding:
    rule: str
    severity: Severity
    resource: str
    message: str
    remedy: str


_RULES: list[Rule] = []


def rule(name: str, severity: Severity, remedy: str) -> Callable[[Check], Check]:
    """Enter a check; its docstring is why it is there."""

    def enter(check: Check) -> Check:
        _RULES.append(Rule(name, severity, (check.__doc__ or "").strip(), remedy, check))
        return check

    return enter


def rules() -> list[Rule]:
    """All of them. They enter themselves when their files are read."""
    for name in ("access", "addons", "data", "running"):
        importlib.import_module(f"infra_pulumi.rules_{name}")
    return _RULES


def findings(recording: Recording, spec: ClusterSpec) -> tuple[Finding, ...]:
    """Errors first, then by rule and resource."""
    found = [
        Finding(each.name, each.severity, resource, message, each.remedy)
        for each in rules()
        for resource, message in each.check(recording, spec)
    ]
    return tuple(sorted(found, key=lambda finding: (finding.severity, finding.rule, finding.resource)))


def get(value: Any, path: str) -> Any:
    """`vpcConfig.subnetIds.0` of nested data; None where there is nothing."""
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)] if key.isdigit() and int(key) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


HOUSE = "it is set by the component; change it back there"


def of(recording: Recording, kinds: set[str]) -> Iterator[Resource]:
    return (resource for resource in recording.resources if resource.kind in kinds)


def expect(kind: str, path: str, wanted: Any) -> Check:
    """That every resource of a kind has a value there, such as `True`."""

    def check(recording: Recording, spec: ClusterSpec) -> Broken:
        for resource in recording.of(kind):
            if (is_ := get(resource.inputs, path)) != wanted:
                yield resource.name, f"{path} is {json.dumps(is_)} and not {json.dumps(wanted)}"

    return check


def expected(name: str, severity: Severity, kind: str, path: str, wanted: Any, why: str, remedy: str) -> None:
    """A rule that is one value."""
    check = expect(kind, path, wanted)
    check.__doc__ = why
    rule(name, severity, remedy)(check)


def inline_pools(recording: Recording) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pools that an AKS cluster is made with, each beside the cluster's name."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        for pool in resource.inputs.get("agentPoolProfiles", []):
            yield resource.name, pool


def gpu_pools(recording: Recording, kind: str, labels: str) -> Iterator[Resource]:
    """Those of a kind whose label `serve-app/pool`, at `labels`, is not the system pool's."""
    return (
        each
        for each in recording.of(kind)
        if (get(each.inputs, labels) or {}).get("serve-app/pool") not in ("system", None)
    )
