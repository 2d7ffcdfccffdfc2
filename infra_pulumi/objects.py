"""Builds the objects in the RayService's namespace: Redis, service account, network policies, disruption budget."""

from __future__ import annotations

from typing import Any

from infra_pulumi.rayservice import NAME, RAY_POD, REDIS, SERVICE_ACCOUNT, container_security, labels, pod_security
from infra_pulumi.spec import ClusterSpec

REDIS_IMAGE = "redis:7.4.6"
REDIS_USER = 999  # the image's user id
OPERATOR_NAMESPACE = "kuberay-system"
MONITORING_NAMESPACE = "monitoring"
IDENTITY_ANNOTATION = {"gcp": "iam.gke.io/gcp-service-account", "azure": "azure.workload.identity/client-id"}
CALLER_LABEL = {"serve-app/caller": "true"}  # label of pods and namespaces that may call it

_REDIS = {"app.kubernetes.io/name": REDIS}
_SERVE, _DASHBOARD = 8000, 8265
_METRICS = (_SERVE, 8080, 44217, 44227)  # the ports in cluster/monitoring/podmonitor.yaml
# Where pods get their cloud credentials; network policies block all other link-local addresses.
_IDENTITY = {"aws": ("169.254.170.23/32", 80), "gcp": ("169.254.169.254/32", 80)}

Object = dict[str, Any]


def _meta(spec: ClusterSpec, name: str, component: str) -> Object:
    return {"name": name, "namespace": spec.name, "labels": labels(component)}


def namespace(spec: ClusterSpec) -> Object:
    """The namespace, with the restricted Pod Security level: no root, no privileges, no host network."""
    level = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": spec.name, "labels": {**labels("namespace"), **level}},
    }


def storage_class() -> Object:
    """The default storage class for AWS, where a new cluster has none: encrypted, in the zone of the pod."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "gp3",
            "labels": labels("storage"),
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "ebs.csi.aws.com",
        "parameters": {"type": "gp3", "encrypted": "true"},
        "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": True,
        "reclaimPolicy": "Delete",
    }


def service_account(spec: ClusterSpec, identity: str = "") -> Object:
    """The workers' service account. It has no rights in Kubernetes; the cloud may let it read a bucket of weights.

    `identity` is its cloud identity if known: the address of a GCP service account or the client id of an Azure managed
    identity. On AWS the cluster has the association, so that no annotation is needed.
    """
    key = IDENTITY_ANNOTATION.get(spec.provider)
    annotations = {"annotations": {key: identity}} if key and identity else {}
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {**_meta(spec, SERVICE_ACCOUNT, "worker"), **annotations},
        "automountServiceAccountToken": False,
    }


def redis_service(spec: ClusterSpec) -> Object:
    """The Kubernetes service of Redis."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(spec, REDIS, "redis"),
        "spec": {"selector": _REDIS, "ports": [{"name": "redis", "port": 6379, "targetPort": "redis"}]},
    }


def redis(spec: ClusterSpec) -> Object:
    """Redis, which stores the state of Ray's GCS, so that a new head finds its workers while the service continues."""
    password = {"secretKeyRef": {"name": REDIS, "key": "password"}}
    ping = {"exec": {"command": ["redis-cli", "ping"]}, "periodSeconds": 10, "timeoutSeconds": 5}
    container = {
        "name": "redis",
        "image": REDIS_IMAGE,
        "command": ["sh", "-c", 'exec redis-server --dir /data --appendonly yes --requirepass "$REDISCLI_AUTH"'],
        "env": [{"name": "REDISCLI_AUTH", "valueFrom": password}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}},
        "securityContext": {**container_security(), "readOnlyRootFilesystem": True},
        "livenessProbe": {**ping, "initialDelaySeconds": 30, "failureThreshold": 6},
        "readinessProbe": ping,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": pod_security(REDIS_USER),
        "containers": [container],
    }
    disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _meta(spec, REDIS, "redis"),
        "spec": {
            "serviceName": REDIS,
            "replicas": 1,
            "selector": {"matchLabels": _REDIS},
            "template": {"metadata": {"labels": {**labels("redis"), **_REDIS}}, "spec": pod},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": disk}],
        },
    }


def disruption_budget(spec: ClusterSpec) -> Object:
    """Prevents the eviction of the only head: a node upgrade waits until an operator deletes the head by hand.

    Workers have no budget: it would need the owner's `scale` subresource, which a RayCluster does not have. Draining
    protects their streams instead.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _meta(spec, f"{NAME}-head", "head"),
        "spec": {
            "minAvailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": {**RAY_POD, "ray.io/node-type": "head"}},
        },
    }


def _tcp(*ports: int) -> list[Object]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _in_namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _pods(matching: dict[str, str]) -> Object:
    return {"podSelector": {"matchLabels": matching}}


def _policy(spec: ClusterSpec, name: str, pods: dict[str, str], ingress: list[Object], egress: list[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(spec, name, "network"),
        "spec": {
            "podSelector": {"matchLabels": pods} if pods else {},
            "policyTypes": ["Ingress", "Egress"],
            **({"ingress": ingress} if ingress else {}),
            **({"egress": egress} if egress else {}),
        },
    }


def _dns() -> Object:
    return {"to": [_in_namespace("kube-system")], "ports": [{"protocol": "UDP", "port": 53}, *_tcp(53)]}


def network_policies(spec: ClusterSpec, servers: tuple[int, ...] = ()) -> list[Object]:
    """Network policies. Only Ray, the operator and Prometheus reach Ray's ports, where callers can execute code.

    Clients reach only the service's port, from pods or namespaces with the label CALLER_LABEL. Outbound traffic is
    allowed to DNS, to Redis, and by HTTPS to all addresses (Kubernetes, model hub, buckets) except link-local ones, and
    to the ports `servers` of the same addresses.
    """
    anywhere = {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}
    ingress = [
        {"from": [_pods(RAY_POD)]},
        {"from": [_in_namespace(OPERATOR_NAMESPACE)], "ports": _tcp(_DASHBOARD, _SERVE)},
        {"from": [_in_namespace(MONITORING_NAMESPACE)], "ports": _tcp(*_METRICS)},
        {"from": [_pods(CALLER_LABEL), {"namespaceSelector": {"matchLabels": CALLER_LABEL}}], "ports": _tcp(_SERVE)},
    ]
    egress = [
        {"to": [_pods(RAY_POD)]},
        {"to": [_pods(_REDIS)], "ports": _tcp(6379)},
        _dns(),
        {"to": [anywhere], "ports": _tcp(443, *servers)},
    ]
    if spec.provider in _IDENTITY:
        cidr, port = _IDENTITY[spec.provider]
        egress.append({"to": [{"ipBlock": {"cidr": cidr}}], "ports": _tcp(port)})
    return [
        _policy(spec, "default-deny", {}, [], []),
        _policy(spec, NAME, RAY_POD, ingress, egress),
        _policy(spec, REDIS, _REDIS, [{"from": [_pods(RAY_POD)], "ports": _tcp(6379)}], []),
    ]


def namespace_objects(spec: ClusterSpec, identity: str = "", servers: tuple[int, ...] = ()) -> list[Object]:
    """All objects that the description enables, in creation order. `servers` are the ports of the config's servers."""
    enabled = [namespace(spec), service_account(spec, identity), redis_service(spec), redis(spec)]
    if spec.provider == "aws":
        enabled.insert(0, storage_class())
    if spec.addons.disruption_budget:
        enabled.append(disruption_budget(spec))
    if spec.addons.network_policy:
        enabled += network_policies(spec, servers)
    return enabled
