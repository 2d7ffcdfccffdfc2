"""Rules about what Pulumi makes in the cluster. Without `addons.by_pulumi` there is nothing that they could find."""

from __future__ import annotations

import json

from infra_pulumi.policy import HOUSE, Broken, get, of, rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

SERVICE = "kubernetes.ray.io.RayService"
HEAD = "spec.rayClusterConfig.headGroupSpec"


@rule("ray-dashboard-public", "error", HOUSE)
def _dashboard_is_inside(recording: Recording, spec: ClusterSpec) -> Broken:
    """Ray's dashboard runs anybody's code."""
    for resource in recording.of(SERVICE):
        if (kind := get(resource.inputs, f"{HEAD}.serviceType")) != "ClusterIP":
            yield resource.name, f"headGroupSpec.serviceType is {kind}"
        if get(resource.inputs, f"{HEAD}.enableIngress"):
            yield resource.name, "headGroupSpec.enableIngress is set"


@rule("ray-without-token", "error", HOUSE)
def _ray_asks(recording: Recording, spec: ClusterSpec) -> Broken:
    """Whoever gets to one of Ray's ports is asked for nothing else."""
    for resource in recording.of(SERVICE):
        if get(resource.inputs, "spec.rayClusterConfig.authOptions.mode") != "token":
            yield resource.name, "authOptions.mode is not token"


@rule("ray-reached-by-every-pod", "warning", "set addons.network_policy: true")
def _ray_is_fenced_in(recording: Recording, spec: ClusterSpec) -> Broken:
    """In Kubernetes everybody reaches everybody until a network policy says otherwise."""
    policies = {
        get(each.inputs, "metadata.name") for each in recording.of("kubernetes.networking.k8s.io.NetworkPolicy")
    }
    for resource in recording.of(SERVICE):
        if "default-deny" not in policies:
            yield resource.name, "its namespace has no network policy default-deny"


@rule("service-outside-the-cluster", "error", "let callers in by a gateway that asks who they are")
def _services_are_inside(recording: Recording, spec: ClusterSpec) -> Broken:
    """A load balancer of a service goes past whatever asks for keys."""
    for resource in recording.of("kubernetes.core.Service"):
        if (kind := get(resource.inputs, "spec.type") or "ClusterIP") != "ClusterIP":
            yield resource.name, f"spec.type is {kind}"


@rule("secret-in-the-state", "error", "make it by hand: docs/deploy.md")
def _state_has_no_secrets(recording: Recording, spec: ClusterSpec) -> Broken:
    """Pulumi's state is copied and kept; what is in it is known to whoever has a copy and the passphrase."""
    for resource in recording.of("kubernetes.core.Secret"):
        yield resource.name, "a Secret is made here"
    for resource in of(recording, {"pulumi.providers.kubernetes"}):
        for user in json.loads(resource.inputs["kubeconfig"])["users"]:
            if kept := sorted(set(user["user"]) - {"exec"}):
                yield resource.name, f"its kubeconfig has {', '.join(kept)}"
