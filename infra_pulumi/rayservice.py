"""Builds the RayService that runs a Ray Serve config on the GPU pools of a description. Pure functions over data.

Field names are those of KubeRay 1.7; tests validate them against its CustomResourceDefinition.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from infra_pulumi import pod_resources
from infra_pulumi.catalogue import Catalogue
from infra_pulumi.serve_config import Object, cluster_config, longest_request_s, vllm_models
from infra_pulumi.spec import POOL_LABEL, ClusterSpec, GpuPool

NAME = "serve-app"  # KubeRay derives the service name serve-app-serve-svc from it; Prometheus selects that name
RAY_VERSION = "2.60.0"  # the version in pyproject.toml
USER_ID = 10001  # the image's user id
HAPROXY = "/opt/serve_app/haproxy"  # both programs are in the image: cluster/image/
DRAIN = "/opt/serve_app/drain"

TOKEN_SECRET = "serve-app-ray-token"  # key auth_token
REDIS = "serve-app-redis"  # the service, and the secret with key password
# Environment variables of the service whose values are in secrets, with the secret and its key. They are optional: a
# config that needs one of them says so in an error of the service if the variable is not set.
OPTIONAL_SECRETS = {
    "HF_TOKEN": ("serve-app-models", "hf_token"),
    "SERVE_APP_DATABASE_PASSWORD": ("serve-app-database", "password"),
    "SERVE_APP_QUOTAS_PASSWORD": ("serve-app-quotas", "password"),
    "SERVE_APP_RESPONSE_CACHE_PASSWORD": ("serve-app-response-cache", "password"),
}
RAY_POD = {"serve-app/ray": "true"}  # on head, workers and the cleanup job; network policies select it
SERVICE_ACCOUNT = "serve-app"  # the workers' account, for access to a bucket of weights

# Ray's autoscaler replaces a pod that has not started after this time. A new GPU node needs up to ten minutes for the
# machine, its driver and an image of 10 GB.
POD_START_S = 1800
IDLE_S = 300
_DRAIN_MARGIN_S = 60

_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
_HEAD_PORTS = {"as-metrics": 44217, "dash-metrics": 44227}
_AGENT_PORT = 52365
_SHM_GIB = 2
_VLLM_SHM_GIB = 2  # for each GPU: the size in vLLM's own example for Kubernetes. Its processes exchange messages there.
CACHE_FOLDER = "/home/serve/.cache"  # weights, and the code that vLLM compiles; a volume of the image with vLLM


@dataclass(frozen=True, slots=True)
class Images:
    """The image of the head and of workers without vLLM, and the image of workers with vLLM."""

    service: str
    vllm: str


def images(spec: ClusterSpec, registry: str = "") -> Images:
    """The images of a description. With `registry`, an image without a registry is in that one."""
    return Images(image_in(spec, spec.serve.image, registry), image_in(spec, spec.serve.vllm_image, registry))


def image_in(spec: ClusterSpec, image: str, registry: str) -> str:
    """The image reference for pulls: an image without a registry is in the cluster's registry."""
    host, _, path = image.partition("/")
    if not registry or (path and (host == "localhost" or {".", ":"} & set(host))):
        return image
    if spec.provider == "aws":  # an ECR repository holds one image
        return registry + re.sub(r"^[^:@]*", "", image)
    return f"{registry}/{image}"


def runs_vllm(spec: ClusterSpec, catalogue: Catalogue, index: int, config: Object) -> bool:
    """Whether Ray can place a replica with vLLM on a node of the pool, which then needs the image with vLLM."""
    gpus = pod_resources.pod_size(spec, catalogue, index).gpus
    return any(model.gpus_per_node <= gpus for model in vllm_models(config))


def environment(longest_s: int) -> list[Object]:
    """Environment variables of Ray and Ray Serve, the same on every node; docs/deploy.md gives the reasons."""
    variables = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": HAPROXY,
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest_s + 30),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.deployments.http_server.middlewares",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.2",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    secrets = {
        name: {"secretKeyRef": {"name": secret, "key": key, "optional": True}}
        for name, (secret, key) in OPTIONAL_SECRETS.items()
    }
    return [{"name": name, "value": value} for name, value in variables.items()] + [
        {"name": name, "valueFrom": secret} for name, secret in secrets.items()
    ]


def container_security() -> Object:
    """The security context of every container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security(user: int = USER_ID) -> Object:
    """The security context of every pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def labels(component: str) -> dict[str, str]:
    """The standard labels of an object."""
    return {
        "app.kubernetes.io/name": NAME,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": NAME,
    }


def _pod_labels(component: str) -> dict[str, str]:
    """Pod labels without a name: KubeRay sets the name, by which the head's service selects its pod (kuberay#2648)."""
    return {
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": NAME,
        **RAY_POD,
    }


def _ports(*named: dict[str, int]) -> list[Object]:
    return [{"name": name, "containerPort": port} for each in named for name, port in each.items()]


def _probe(path: str, port: int | str, period_s: int, failures: int, timeout_s: int = 5) -> Object:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }


def _scratch(shm_gib: int = _SHM_GIB) -> tuple[list[Object], list[Object]]:
    """Volumes and mounts for shared memory, which counts as the pod's memory if it is used, and for Ray's logs."""
    volumes: list[Object] = [
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
        {"name": "ray-logs", "emptyDir": {"sizeLimit": "10Gi"}},
    ]
    return volumes, [{"name": "shared-mem", "mountPath": "/dev/shm"}, {"name": "ray-logs", "mountPath": "/tmp/ray"}]


def _vllm_scratch(gpus: int) -> tuple[list[Object], list[Object]]:
    """The same for a worker with vLLM on `gpus` GPUs, and its cache folder on the node's disk.

    The namespace allows no folders of the node. The volume ends with the pod; replicas and containers of the pod that
    start again find what the first one has downloaded and compiled.
    """
    volumes, mounts = _scratch(_SHM_GIB + _VLLM_SHM_GIB * gpus)
    return [*volumes, {"name": "cache", "emptyDir": {}}], [*mounts, {"name": "cache", "mountPath": CACHE_FOLDER}]


def _object_store() -> dict[str, str]:
    return {
        "object-store-memory": str(2**30)
    }  # bytes; the service sends tokens by value, so that the default is not needed


def _head(spec: ClusterSpec, config: Object, image: str) -> Object:
    """The head group: on a CPU node, and with zero CPUs for Ray, so that no replica runs on it."""
    longest_s, port = longest_request_s(config), config["http_options"].get("port", 8000)
    volumes, mounts = _scratch()
    container = {
        "name": "ray-head",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "ports": _ports(_PORTS, {"serve": port}, _HEAD_PORTS),
        "env": environment(longest_s),
        "resources": {
            "requests": {"cpu": "2", "memory": "8Gi"},
            "limits": {"cpu": "4", "memory": "8Gi"},
        },
        "securityContext": container_security(),
        # The agent reports the health of raylet and GCS. The start takes up to a minute; later, two minutes without an
        # answer restart the container.
        "startupProbe": _probe("/api/healthz", _AGENT_PORT, 5, 60),
        "livenessProbe": _probe("/api/healthz", _AGENT_PORT, 10, 12),
        "readinessProbe": _probe("/api/healthz", _AGENT_PORT, 5, 3),
        "volumeMounts": mounts,
    }
    pools = [pool.name for pool in spec.gpu_pools]
    not_gpu_pool = {"matchExpressions": [{"key": POOL_LABEL, "operator": "NotIn", "values": pools}]}
    return {
        "serviceType": "ClusterIP",
        "enableIngress": False,
        # The operator deploys through the dashboard's port at the pod's address. The port needs the token, has no
        # ingress, and the network policy allows only the operator.
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", **_object_store()},  # noqa: S104
        "template": {
            "metadata": {
                "labels": _pod_labels("head"),
                "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            },
            "spec": {
                "securityContext": pod_security(),
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [not_gpu_pool]},
                    }
                },
                "terminationGracePeriodSeconds": 60,
                "containers": [container],
                "volumes": volumes,
            },
        },
    }


def tolerations(spec: ClusterSpec, pool: GpuPool) -> list[Object]:
    """Tolerations for the taints of the pool's nodes: the GPU taint, the provider's and the description's."""
    found: list[Object] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    spot = {"azure": "kubernetes.azure.com/scalesetpriority", "gcp": "cloud.google.com/gke-spot"}
    if pool.spot and spec.provider in spot:
        found.append({"key": spot[spec.provider], "operator": "Exists", "effect": "NoSchedule"})
    return found + [
        {"key": taint.key, "operator": "Equal", "value": taint.value, "effect": taint.effect} for taint in pool.taints
    ]


def _identity_label(spec: ClusterSpec) -> dict[str, str]:
    """The label that a pod needs on Azure to get a token of its identity."""
    return {"azure.workload.identity/use": "true"} if spec.provider == "azure" else {}


def _workers(spec: ClusterSpec, catalogue: Catalogue, index: int, config: Object, images: Images) -> Object:
    """The worker group of a pool: one pod per node. Ray does not distinguish spot and on-demand nodes."""
    pool, size = spec.gpu_pools[index], pod_resources.pod_size(spec, catalogue, index)
    longest_s, port = longest_request_s(config), config["http_options"].get("port", 8000)
    vllm = runs_vllm(spec, catalogue, index, config)
    volumes, mounts = _vllm_scratch(size.gpus) if vllm else _scratch()
    amount = {"memory": f"{size.memory_gib}Gi", "nvidia.com/gpu": str(size.gpus)}
    container = {
        "name": "ray-worker",
        "image": images.vllm if vllm else images.service,
        "imagePullPolicy": "IfNotPresent",
        "ports": _ports({"metrics": _PORTS["metrics"], "serve": port}),
        "env": environment(longest_s),
        # The limit exceeds the request: the request is the CPU that is free on every node.
        "resources": {
            "requests": {"cpu": str(size.cpus), **amount},
            "limits": {"cpu": str(size.cpu_limit), **amount},
        },
        "securityContext": container_security(),
        "startupProbe": _probe("/api/healthz", _AGENT_PORT, 5, 60),
        "livenessProbe": _probe("/api/healthz", _AGENT_PORT, 10, 12),
        # A worker is ready if its proxy answers; a worker without a replica has no proxy and gets no requests.
        "readinessProbe": _probe("/-/healthz", "serve", 5, 2),
        # Ray moves the replicas to other nodes and stops after the last stream, unless a spot node is reclaimed first.
        "lifecycle": {"preStop": {"exec": {"command": [DRAIN, str(longest_s)]}}},
        "volumeMounts": mounts,
    }
    return {
        "groupName": pool.name,
        "minReplicas": pool.min,
        "replicas": pool.min,
        "maxReplicas": pool.max,
        "rayStartParams": {"num-cpus": str(size.cpus), **_object_store()},
        "template": {
            "metadata": {
                "labels": {**_pod_labels("worker"), **_identity_label(spec)},
                "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            },
            "spec": {
                "serviceAccountName": SERVICE_ACCOUNT,
                "automountServiceAccountToken": False,
                "securityContext": pod_security(),
                "nodeSelector": {POOL_LABEL: pool.name},
                "tolerations": tolerations(spec, pool),
                "terminationGracePeriodSeconds": longest_s + _DRAIN_MARGIN_S,
                "containers": [container],
                "volumes": volumes,
            },
        },
    }


def _autoscaler() -> Object:
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": IDLE_S,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": container_security(),
        "env": [{"name": "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", "value": str(POD_START_S)}],
        "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }


def rayservice(spec: ClusterSpec, catalogue: Catalogue, config: Object, found: Images | None = None) -> Object:
    """The RayService of a description and of a config that `read_config` returned. Raises CatalogueError, SpecError.

    The namespace has the cluster's name, which the cloud identities of the pods refer to. `found` has the images with
    their registry, if known; the default is the description's images. The secrets TOKEN_SECRET and REDIS must exist.
    """
    config, found = cluster_config(spec, catalogue, config), found or images(spec)
    password = {"valueFrom": {"secretKeyRef": {"name": REDIS, "key": "password"}}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME, "namespace": spec.name, "labels": labels("service")},
        "spec": {
            # A changed config is deployed in place. For other changes KubeRay starts a second cluster first.
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": longest_request_s(config) + _DRAIN_MARGIN_S,
            # Requests pass through workers only, so that a restart of the head interrupts no stream.
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.safe_dump(config, sort_keys=False, width=120),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": _autoscaler(),
                "gcsFaultToleranceOptions": {"redisAddress": f"{REDIS}:6379", "redisPassword": password},
                "headGroupSpec": _head(spec, config, found.service),
                "workerGroupSpecs": [
                    _workers(spec, catalogue, index, config, found) for index in range(len(spec.gpu_pools))
                ],
            },
        },
    }
