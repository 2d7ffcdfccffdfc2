"""Policy rules over a recording. A rule is a function that yields a message for each resource that violates it.

A finding of severity `error` prevents a deployment, a `warning` does not.
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
Violations: TypeAlias = Iterator[tuple[str, str]]  # (resource name, message)
Check: TypeAlias = Callable[[Recording, ClusterSpec], Violations]


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
    """Decorator that registers a check as a rule. The check's docstring is the rule's reason."""

    def register(check: Check) -> Check:
        _RULES.append(Rule(name, severity, (check.__doc__ or "").strip(), remedy, check))
        return check

    return register


def rules() -> list[Rule]:
    """All rules. The modules rules_*.py register them on import."""
    for name in ("access", "addons", "data", "operations"):
        importlib.import_module(f"infra_pulumi.rules_{name}")
    return _RULES


def findings(recording: Recording, spec: ClusterSpec) -> tuple[Finding, ...]:
    """The violations of all rules: errors first, then by rule and resource."""
    found = [
        Finding(each.name, each.severity, resource, message, each.remedy)
        for each in rules()
        for resource, message in each.check(recording, spec)
    ]
    return tuple(sorted(found, key=lambda finding: (finding.severity, finding.rule, finding.resource)))


def get(value: Any, path: str) -> Any:
    """The value at a dotted path such as `vpcConfig.subnetIds.0` in nested data, or None."""
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)] if key.isdigit() and int(key) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


COMPONENT_REMEDY = "restore the value that the component sets"


def resources_of(recording: Recording, kinds: set[str]) -> Iterator[Resource]:
    """The resources of several kinds."""
    return (resource for resource in recording.resources if resource.kind in kinds)


def _value_check(kind: str, path: str, required: Any) -> Check:
    """A check that every resource of a kind has the required value at a path."""

    def check(recording: Recording, spec: ClusterSpec) -> Violations:
        for resource in recording.of(kind):
            if (actual := get(resource.inputs, path)) != required:
                yield resource.name, f"{path} is {json.dumps(actual)}, but must be {json.dumps(required)}"

    return check


def value_rule(name: str, severity: Severity, kind: str, path: str, required: Any, why: str, remedy: str) -> None:
    """Register a rule that requires one value."""
    check = _value_check(kind, path, required)
    check.__doc__ = why
    rule(name, severity, remedy)(check)


def inline_pools(recording: Recording) -> Iterator[tuple[str, dict[str, Any]]]:
    """The node pools in the AKS cluster resource itself, as (cluster name, pool)."""
    for resource in recording.of("azure-native.containerservice.ManagedCluster"):
        for pool in resource.inputs.get("agentPoolProfiles", []):
            yield resource.name, pool


def gpu_pools(recording: Recording, kind: str, labels: str) -> Iterator[Resource]:
    """The GPU pools among the resources of a kind, by the label `serve-app/pool` at the path `labels`."""
    return (
        each
        for each in recording.of(kind)
        if (get(each.inputs, labels) or {}).get("serve-app/pool") not in ("system", None)
    )
