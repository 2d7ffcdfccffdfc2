"""The RayService: this very serve_config.yaml on the GPU pools of a description. Pure: data in, data out.

Field names are those of KubeRay 1.7; tests hold them against its CustomResourceDefinition.
"""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra_pulumi import sizes
from infra_pulumi.catalogue import Catalogue
from infra_pulumi.spec import POOL_LABEL, ClusterSpec, Fault, GpuPool, SpecError

NAME = "serve-app"  # KubeRay calls the service in front of it serve-app-serve-svc, which Prometheus is told of
RAY_VERSION = "2.60.0"  # that of pyproject.toml
USER_ID = 10001  # the image's
HAPROXY = "/opt/serve_app/haproxy"  # both are in the image: cluster/image/
DRAIN = "/opt/serve_app/drain"

TOKEN_SECRET = "serve-app-ray-token"  # key auth_token
REDIS = "serve-app-redis"  # its service, and the secret with the key password
MODEL_SECRET = "serve-app-models"  # optional: key hf_token
RAY_POD = {"serve-app/ray": "true"}  # head, workers, and the job that empties Redis: what network policies select by
SERVICE_ACCOUNT = "serve-app"  # of the workers: what may read weights in a bucket

# Ray's autoscaler gives a pod up that has not started by then, and asks for another. A fresh GPU node needs up to ten
# minutes: the machine, its driver, 10 GB of image.
POD_START_S = 1800
IDLE_S = 300
_DRAIN_MARGIN_S = 60

_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
_HEAD_PORTS = {"as-metrics": 44217, "dash-metrics": 44227}
_AGENT_PORT = 52365
_SHM_GIB = 2

Object = dict[str, Any]


class _Section(BaseModel):
    """What is read here of the service's own configuration; the service judges the rest.

    Numbers are strict, for it is the file as it was written that goes on.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Resources(_Section):
    num_gpus: float = Field(0, ge=0, strict=True)


class _Autoscaling(_Section):
    max_replicas: int = Field(1, ge=1, strict=True)


class _Deployment(_Section):
    autoscaling: _Autoscaling | None = None


class _Model(_Section):
    device: str = "auto"
    resources: _Resources | None = None
    deployment: _Deployment | None = None


class _Limits(_Section):
    request_timeout_s: float = Field(600, gt=0, strict=True)


class _Service(_Section):
    models: tuple[_Model, ...] = Field(min_length=1)
    limits: _Limits | None = None


class _Application(_Section):
    args: _Service


class _HttpOptions(_Section):
    port: int = Field(8000, ge=1, le=65535, strict=True)


class _File(_Section):
    applications: tuple[_Application, ...] = Field(min_length=1)
    http_options: _HttpOptions | None = None


def read_config(path: Path) -> Object:
    """A Ray Serve config file of this service. Raises SpecError with every fault of what is read here."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        _File.model_validate(document)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError([Fault("serve.config", " ".join(str(error).split()))]) from None
    except ValidationError as error:
        message = f"{path} is no config file of Ray Serve with this service; begin with the repository's"
        faults = [Fault(f"serve.config: {'.'.join(map(str, each['loc']))}", each["msg"]) for each in error.errors()]
        raise SpecError([Fault("serve.config", message), *faults]) from None
    assert isinstance(document, dict)
    return document


def _models(config: Object) -> list[Object]:
    return [model for application in config["applications"] for model in application["args"]["models"]]


def longest_request_s(config: Object) -> int:
    """How long a request may take, in whole seconds."""
    services = [application.args for application in _File.model_validate(config).applications]
    return math.ceil(max((service.limits or _Limits()).request_timeout_s for service in services))


def on_gpus(spec: ClusterSpec, catalogue: Catalogue, config: Object) -> Object:
    """The config as the cluster runs it. What differs from the file:

    Pods are reached by their addresses, so HTTP listens on all of a pod's. A model that reserves no GPU gets one, or it
    would compute on the CPU of a GPU machine; if it says `device: cpu` that is meant. `auto` becomes `cuda`, or a node
    whose driver is too old would do the same without a word. One that was to have a single replica may have as many as
    the pools have GPUs for.
    """
    config = deepcopy(config)
    config["http_options"] = {**(config.get("http_options") or {}), "host": "0.0.0.0"}
    for model in _models(config):
        if model.get("device", "auto") == "cpu":
            continue
        resources = model.get("resources") or {}
        resources["num_gpus"] = resources.get("num_gpus") or 1
        model |= {"device": "cuda", "resources": resources}
        deployment = model.get("deployment") or {}
        autoscaling = deployment.get("autoscaling") or {}
        if "num_replicas" not in deployment and autoscaling.get("max_replicas", 1) == 1:
            autoscaling["max_replicas"] = max(1, int(sizes.gpus(spec, catalogue) / resources["num_gpus"]))
            model["deployment"] = {**deployment, "autoscaling": autoscaling}
    return config


def image_in(spec: ClusterSpec, registry: str) -> str:
    """The description's image as it is pulled: one without a registry of its own is in the cluster's."""
    image = spec.serve.image
    host, _, path = image.partition("/")
    if path and (host == "localhost" or {".", ":"} & set(host)):
        return image
    if spec.provider == "aws":  # whose registry is of one image
        return registry + re.sub(r"^[^:@]*", "", image)
    return f"{registry}/{image}"


def environment(longest_s: int) -> list[Object]:
    """Ray's and Ray Serve's switches, the same on every node. README, "On a cluster", says why."""
    switches = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": HAPROXY,
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest_s + 30),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    token = {"secretKeyRef": {"name": MODEL_SECRET, "key": "hf_token", "optional": True}}
    return [{"name": name, "value": value} for name, value in switches.items()] + [
        {"name": "HF_TOKEN", "valueFrom": token}
    ]


def container_security() -> Object:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security(user: int = USER_ID) -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def labels(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": NAME,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": NAME,
    }


def _pod_labels(component: str) -> dict[str, str]:
    """Without a name: KubeRay gives one, by which the service in front of the head finds it (kuberay#2648)."""
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


def _scratch() -> tuple[list[Object], list[Object]]:
    """Volumes and their mounts: Ray's shared memory, which counts as the pod's, and its logs."""
    volumes = [
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHM_GIB}Gi"}},
        {"name": "ray-logs", "emptyDir": {"sizeLimit": "10Gi"}},
    ]
    return volumes, [{"name": "shared-mem", "mountPath": "/dev/shm"}, {"name": "ray-logs", "mountPath": "/tmp/ray"}]


def _object_store() -> dict[str, str]:
    return {"object-store-memory": str(2**30)}  # tokens are tiny and pass by value


def _head(spec: ClusterSpec, config: Object, image: str) -> Object:
    """On a CPU node, and with no CPU for Ray to give away: what it dies of is never a model."""
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
        # The agent answers for raylet and GCS. Starting takes a minute; later, two without an answer are the end.
        "startupProbe": _probe("/api/healthz", _AGENT_PORT, 5, 60),
        "livenessProbe": _probe("/api/healthz", _AGENT_PORT, 10, 12),
        "readinessProbe": _probe("/api/healthz", _AGENT_PORT, 5, 3),
        "volumeMounts": mounts,
    }
    pools = [pool.name for pool in spec.gpu_pools]
    away = {"matchExpressions": [{"key": POOL_LABEL, "operator": "NotIn", "values": pools}]}
    return {
        "serviceType": "ClusterIP",
        "enableIngress": False,
        # The operator deploys through the dashboard's port, at the pod's address: it asks for the token, has no
        # ingress, and the network policy lets the operator alone reach it.
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", **_object_store()},
        "template": {
            "metadata": {
                "labels": _pod_labels("head"),
                "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            },
            "spec": {
                "securityContext": pod_security(),
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [away]},
                    }
                },
                "terminationGracePeriodSeconds": 60,
                "containers": [container],
                "volumes": volumes,
            },
        },
    }


def tolerations(spec: ClusterSpec, pool: GpuPool) -> list[Object]:
    """For the taints of the pool's nodes: our own, the provider's, the description's."""
    found: list[Object] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    spot = {"azure": "kubernetes.azure.com/scalesetpriority", "gcp": "cloud.google.com/gke-spot"}
    if pool.spot and spec.provider in spot:
        found.append({"key": spot[spec.provider], "operator": "Exists", "effect": "NoSchedule"})
    return found + [
        {"key": taint.key, "operator": "Equal", "value": taint.value, "effect": taint.effect} for taint in pool.taints
    ]


def _identity_label(spec: ClusterSpec) -> dict[str, str]:
    """On Azure only pods with it are given a token of their identity."""
    return {"azure.workload.identity/use": "true"} if spec.provider == "azure" else {}


def _workers(spec: ClusterSpec, catalogue: Catalogue, index: int, config: Object, image: str) -> Object:
    """One group for each pool, one pod for each node of it; spot or on demand, they are alike to Ray."""
    pool, size = spec.gpu_pools[index], sizes.pod_size(spec, catalogue, index)
    longest_s, port = longest_request_s(config), config["http_options"].get("port", 8000)
    volumes, mounts = _scratch()
    amount = {"memory": f"{size.memory_gib}Gi", "nvidia.com/gpu": str(size.gpus)}
    container = {
        "name": "ray-worker",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "ports": _ports({"metrics": _PORTS["metrics"], "serve": port}),
        "env": environment(longest_s),
        # More CPU than is asked for may be used: what is asked for is only what is surely free on the node.
        "resources": {
            "requests": {"cpu": str(size.cpus), **amount},
            "limits": {"cpu": str(size.cpu_limit), **amount},
        },
        "securityContext": container_security(),
        "startupProbe": _probe("/api/healthz", _AGENT_PORT, 5, 60),
        "livenessProbe": _probe("/api/healthz", _AGENT_PORT, 10, 12),
        # Ready is one whose proxy answers, and only those get requests; a worker without a replica has no proxy.
        "readinessProbe": _probe("/-/healthz", "serve", 5, 2),
        # Ray moves its replicas elsewhere and ends when the last stream has ended, but for a spot node's short notice.
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


def rayservice(spec: ClusterSpec, catalogue: Catalogue, config: Object, image: str = "") -> Object:
    """The RayService of a description and a config as `read_config` gives it. Raises CatalogueError.

    Its namespace is called like the cluster, as the clouds' identities of its pods are told.
    `image` is the description's with its registry, once that is known. Two secrets are needed that are never in a file:
    TOKEN_SECRET and REDIS.
    """
    config, image = on_gpus(spec, catalogue, config), image or spec.serve.image
    password = {"valueFrom": {"secretKeyRef": {"name": REDIS, "key": "password"}}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME, "namespace": spec.name, "labels": labels("service")},
        "spec": {
            # A changed config is deployed in place; a changed cluster is a second one, which takes over once it serves.
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": longest_request_s(config) + _DRAIN_MARGIN_S,
            # Streams pass through workers only, so that the head can go and come without cutting one.
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.safe_dump(config, sort_keys=False, width=120),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": _autoscaler(),
                "gcsFaultToleranceOptions": {"redisAddress": f"{REDIS}:6379", "redisPassword": password},
                "headGroupSpec": _head(spec, config, image),
                "workerGroupSpecs": [
                    _workers(spec, catalogue, index, config, image) for index in range(len(spec.gpu_pools))
                ],
            },
        },
    }
