"""What stands beside the RayService in its namespace: Ray's memory, who may talk to whom, what may not be evicted."""

from __future__ import annotations

from typing import Any

from infra_pulumi.rayservice import NAME, RAY_POD, REDIS, SERVICE_ACCOUNT, container_security, labels, pod_security
from infra_pulumi.spec import ClusterSpec

REDIS_IMAGE = "redis:7.4.6"
REDIS_USER = 999  # that image's
OPERATOR_NAMESPACE = "kuberay-system"
MONITORING_NAMESPACE = "monitoring"
IDENTITY_ANNOTATION = {"gcp": "iam.gke.io/gcp-service-account", "azure": "azure.workload.identity/client-id"}
CALLER = {"serve-app/caller": "true"}  # on a pod beside the service, or on a namespace: may call it

_REDIS = {"app.kubernetes.io/name": REDIS}
_SERVE, _DASHBOARD = 8000, 8265
_METRICS = (_SERVE, 8080, 44217, 44227)  # as cluster/monitoring/podmonitor.yaml names them
# Where a pod gets credentials of its own from; nothing else has business with link-local addresses.
_IDENTITY = {"aws": ("169.254.170.23/32", 80), "gcp": ("169.254.169.254/32", 80)}

Object = dict[str, Any]


def _meta(spec: ClusterSpec, name: str, component: str) -> Object:
    return {"name": name, "namespace": spec.name, "labels": labels(component)}


def namespace(spec: ClusterSpec) -> Object:
    """In it no pod may be privileged, run as root or use the node's network."""
    level = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": spec.name, "labels": {**labels("namespace"), **level}},
    }


def storage_class() -> Object:
    """What disks are made of on AWS, where a new cluster has no default; made where the pod is, and encrypted."""
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
    """The workers'. It may nothing in Kubernetes; the cloud may let it read a bucket of weights.

    `identity` is what it is to the cloud, once that is known: GCP's service account by its address, Azure's managed
    identity by its client id. AWS associates them without being told here.
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
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(spec, REDIS, "redis"),
        "spec": {"selector": _REDIS, "ports": [{"name": "redis", "port": 6379, "targetPort": "redis"}]},
    }


def redis(spec: ClusterSpec) -> Object:
    """Where Ray's head keeps what it knows, so that a new head finds its workers and the service goes on meanwhile."""
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
    """Nobody evicts the last healthy head: a node's upgrade waits until it is deleted by hand, at a quiet time.

    Workers have none. Such a budget counts replicas by the owner's `scale`, which a RayCluster has not; what guards
    their streams is that they drain.
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


def _space(name: str) -> Object:
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


def _names() -> Object:
    return {"to": [_space("kube-system")], "ports": [{"protocol": "UDP", "port": 53}, *_tcp(53)]}


def network_policies(spec: ClusterSpec) -> list[Object]:
    """Whoever reaches Ray's ports may run code, token or not: nobody does but Ray, its operator and Prometheus.

    Callers reach the service alone, from pods or namespaces with the label CALLER. Out it goes to names, to Redis, and
    by HTTPS to everywhere (Kubernetes, model hub, buckets) except link-local addresses.
    """
    anywhere = {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}
    ingress = [
        {"from": [_pods(RAY_POD)]},
        {"from": [_space(OPERATOR_NAMESPACE)], "ports": _tcp(_DASHBOARD, _SERVE)},
        {"from": [_space(MONITORING_NAMESPACE)], "ports": _tcp(*_METRICS)},
        {"from": [_pods(CALLER), {"namespaceSelector": {"matchLabels": CALLER}}], "ports": _tcp(_SERVE)},
    ]
    egress = [
        {"to": [_pods(RAY_POD)]},
        {"to": [_pods(_REDIS)], "ports": _tcp(6379)},
        _names(),
        {"to": [anywhere], "ports": _tcp(443)},
    ]
    if spec.provider in _IDENTITY:
        cidr, port = _IDENTITY[spec.provider]
        egress.append({"to": [{"ipBlock": {"cidr": cidr}}], "ports": _tcp(port)})
    return [
        _policy(spec, "default-deny", {}, [], []),
        _policy(spec, NAME, RAY_POD, ingress, egress),
        _policy(spec, REDIS, _REDIS, [{"from": [_pods(RAY_POD)], "ports": _tcp(6379)}], []),
    ]


def beside(spec: ClusterSpec, identity: str = "") -> list[Object]:
    """All of them that the description wants, in the order in which they are to be made."""
    found = [namespace(spec), service_account(spec, identity), redis_service(spec), redis(spec)]
    if spec.provider == "aws":
        found.insert(0, storage_class())
    if spec.addons.disruption_budget:
        found.append(disruption_budget(spec))
    if spec.addons.network_policy:
        found += network_policies(spec)
    return found
