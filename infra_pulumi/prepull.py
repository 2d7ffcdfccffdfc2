"""Builds the pods that pull the image of the workers onto each GPU node before a worker needs it."""

from __future__ import annotations

from infra_pulumi.catalogue import Catalogue
from infra_pulumi.rayservice import NAME, Images, container_security, labels, pod_security, runs_vllm, tolerations
from infra_pulumi.serve_config import Object, cluster_config
from infra_pulumi.spec import POOL_LABEL, ClusterSpec

_COMPONENT = "prepull"


def prepull_objects(spec: ClusterSpec, catalogue: Catalogue, config: Object, images: Images) -> list[Object]:
    """One DaemonSet for each GPU pool, or none if the description disables them. Raises CatalogueError, SpecError.

    On a new node its pod starts before the node has registered its GPU, which a worker waits for. After a change of the
    image it pulls the new image while the old workers serve.
    """
    if not spec.addons.image_prepull:
        return []
    config = cluster_config(spec, catalogue, config)
    return [
        _daemon_set(spec, index, images.vllm if runs_vllm(spec, catalogue, index, config) else images.service)
        for index in range(len(spec.gpu_pools))
    ]


def _daemon_set(spec: ClusterSpec, index: int, image: str) -> Object:
    pool = spec.gpu_pools[index]
    name = f"{NAME}-{_COMPONENT}-{pool.name}"
    selected = {**labels(_COMPONENT), POOL_LABEL: pool.name}
    container = {
        "name": _COMPONENT,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "infinity"],
        "resources": {"requests": {"cpu": "1m", "memory": "16Mi"}, "limits": {"cpu": "10m", "memory": "16Mi"}},
        "securityContext": {**container_security(), "readOnlyRootFilesystem": True},
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": pod_security(),
        "nodeSelector": {POOL_LABEL: pool.name},
        "tolerations": tolerations(spec, pool),
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": spec.name, "labels": labels(_COMPONENT)},
        "spec": {
            "selector": {"matchLabels": selected},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
            "template": {"metadata": {"labels": selected}, "spec": pod},
        },
    }
