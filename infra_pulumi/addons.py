"""Creates the charts and objects in the cluster with Pulumi; `render` writes the same ones as files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
from pulumi_kubernetes.helm.v3 import Release, RepositoryOptsArgs

from infra_pulumi.base import Access, GpuCluster
from infra_pulumi.charts import Chart, charts
from infra_pulumi.objects import namespace_objects
from infra_pulumi.prepull import prepull_objects
from infra_pulumi.rayservice import Images, image_in, rayservice
from infra_pulumi.serve_config import longest_request_s, server_ports

Object = dict[str, Any]

# Annotations that Pulumi reads, by kind.
#
# Redis starts only after its secret exists, and the pods of a DaemonSet only after the image exists. Both come by hand
# later, so that Pulumi must not wait for them. When a RayService is deleted, a job of KubeRay empties Redis first.
# Pulumi deletes in the foreground by default, and Kubernetes would then delete that job before it has run.
_PULUMI_ANNOTATIONS: Mapping[str, dict[str, str]] = {
    "Service": {"pulumi.com/skipAwait": "true"},
    "StatefulSet": {"pulumi.com/skipAwait": "true"},
    "DaemonSet": {"pulumi.com/skipAwait": "true"},
    "RayService": {"pulumi.com/deletionPropagationPolicy": "background"},
}
_DELETION_MARGIN_S = 900


class Addons(pulumi.ComponentResource):
    """The objects, charts and RayService in the cluster, created one after the other, after the cluster.

    Each depends on the previous one, so that they are created in installation order and deleted in reverse order.
    `config` is the service's configuration as `read_config` returns it.
    """

    def __init__(self, cluster: GpuCluster, config: Object) -> None:
        super().__init__("serve-app:infra:Addons", cluster.name("addons"))
        spec, outputs, access = cluster.spec, cluster.outputs, cluster.access()
        self._name = cluster.name
        # Deleting the namespace waits for its last pod, and a worker pod waits for its last stream.
        self._timeouts = pulumi.CustomTimeouts(delete=f"{longest_request_s(config) + _DELETION_MARGIN_S}s")
        self._kubernetes = kubernetes.Provider(
            cluster.name("kubernetes"),
            kubeconfig=kubeconfig(access),
            cluster_identifier=access.server,  # a new certificate must not replace the objects
            opts=pulumi.ResourceOptions(parent=self, depends_on=[cluster]),
        )
        self._previous: list[pulumi.Resource] = []
        for document in namespace_objects(spec, outputs.identity, server_ports(config)):
            self._object(document)
        for chart in charts(spec):
            self._release(chart)
        registry = pulumi.Output.from_input(outputs.registry)
        images = Images(
            registry.apply(lambda host: image_in(spec, spec.serve.image, host)),
            registry.apply(lambda host: image_in(spec, spec.serve.vllm_image, host)),
        )
        for document in prepull_objects(spec, cluster.catalogue, config, images):
            self._object(document)
        self._object(rayservice(spec, cluster.catalogue, config, images))
        self.register_outputs({})

    def _options(self) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(
            parent=self, provider=self._kubernetes, depends_on=self._previous, custom_timeouts=self._timeouts
        )

    def _object(self, document: Object) -> None:
        """Register an object as its manifest states it. The SDK's classes would need Python names for every key."""
        version, kind, metadata = document["apiVersion"], document["kind"], document["metadata"]
        if kind in _PULUMI_ANNOTATIONS:
            annotations = {**metadata.get("annotations", {}), **_PULUMI_ANNOTATIONS[kind]}
            metadata = {**metadata, "annotations": annotations}
        created = pulumi.CustomResource(
            f"kubernetes:{version if '/' in version else f'core/{version}'}:{kind}",
            self._name(kind.lower(), metadata["name"]),
            {**document, "metadata": metadata},
            self._options(),
        )
        self._previous = [created]

    def _release(self, chart: Chart) -> None:
        """Install a chart without waiting for its pods, because Grafana's password is created by hand later."""
        created = Release(
            self._name("release", chart.release),
            name=chart.release,
            chart=chart.chart,
            version=chart.version,
            repository_opts=RepositoryOptsArgs(repo=chart.repository),
            namespace=chart.namespace,
            create_namespace=True,
            values=chart.values,
            skip_await=True,
            opts=self._options(),
        )
        self._previous = [created]


def kubeconfig(access: Access) -> pulumi.Output[str]:
    """A kubeconfig without credentials: the cloud's own program prints a token with the rights of Pulumi's user."""
    name = "cluster"
    program, *arguments = access.command
    token = {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "command": program,
        "args": arguments,
        "interactiveMode": "Never",
        "provideClusterInfo": True,
    }
    return pulumi.Output.json_dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": name,
                    "cluster": {"server": access.server, "certificate-authority-data": access.certificate_authority},
                }
            ],
            "users": [{"name": name, "user": {"exec": token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }
    )
