"""Policy rules about objects that Pulumi creates in the cluster; they apply only with `addons.by_pulumi`."""

from __future__ import annotations

import json

from infra_pulumi.policy import COMPONENT_REMEDY, Violations, get, resources_of, rule
from infra_pulumi.record import Recording
from infra_pulumi.spec import ClusterSpec

SERVICE = "kubernetes.ray.io.RayService"
HEAD = "spec.rayClusterConfig.headGroupSpec"


@rule("ray-dashboard-public", "error", COMPONENT_REMEDY)
def _dashboard_is_private(recording: Recording, spec: ClusterSpec) -> Violations:
    """Ray's dashboard executes code for its callers."""
    for resource in recording.of(SERVICE):
        if (kind := get(resource.inputs, f"{HEAD}.serviceType")) != "ClusterIP":
            yield resource.name, f"headGroupSpec.serviceType is {kind}"
        if get(resource.inputs, f"{HEAD}.enableIngress"):
            yield resource.name, "headGroupSpec.enableIngress is set"


@rule("ray-without-token", "error", COMPONENT_REMEDY)
def _ray_needs_token(recording: Recording, spec: ClusterSpec) -> Violations:
    """The token is the only authentication on Ray's ports."""
    for resource in recording.of(SERVICE):
        if get(resource.inputs, "spec.rayClusterConfig.authOptions.mode") != "token":
            yield resource.name, "authOptions.mode is not token"


@rule("ray-reached-by-every-pod", "warning", "set addons.network_policy: true")
def _ray_has_network_policy(recording: Recording, spec: ClusterSpec) -> Violations:
    """Without network policies, every pod in Kubernetes can reach every other pod."""
    policies = {
        get(each.inputs, "metadata.name") for each in recording.of("kubernetes.networking.k8s.io.NetworkPolicy")
    }
    for resource in recording.of(SERVICE):
        if "default-deny" not in policies:
            yield resource.name, "its namespace has no network policy named default-deny"


@rule("service-outside-the-cluster", "error", "expose the service through a gateway with authentication")
def _services_are_private(recording: Recording, spec: ClusterSpec) -> Violations:
    """A service's own load balancer bypasses the gateway that authenticates clients."""
    for resource in recording.of("kubernetes.core.Service"):
        if (kind := get(resource.inputs, "spec.type") or "ClusterIP") != "ClusterIP":
            yield resource.name, f"spec.type is {kind}"


@rule("secret-in-the-state", "error", "create it by hand: docs/deploy.md")
def _state_has_no_secrets(recording: Recording, spec: ClusterSpec) -> Violations:
    """Anyone with a copy of Pulumi's state and its passphrase can read the secrets in it."""
    for resource in recording.of("kubernetes.core.Secret"):
        yield resource.name, "Pulumi creates a Secret"
    for resource in resources_of(recording, {"pulumi.providers.kubernetes"}):
        for user in json.loads(resource.inputs["kubeconfig"])["users"]:
            if credentials := sorted(set(user["user"]) - {"exec"}):
                yield resource.name, f"its kubeconfig contains {', '.join(credentials)}"
