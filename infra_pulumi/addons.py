"""What runs in the cluster, made by Pulumi: the very charts and objects that `render` writes as files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
from pulumi_kubernetes.helm.v3 import Release, RepositoryOptsArgs

from infra_pulumi.base import Access, GpuCluster
from infra_pulumi.charts import Chart, charts
from infra_pulumi.objects import beside
from infra_pulumi.rayservice import image_in, longest_request_s, rayservice

Object = dict[str, Any]

# What Pulumi is told about an object, which it reads in the object's annotations.
#
# Redis waits for a secret that is made by hand later, and Pulumi would wait for Redis. A RayService goes when KubeRay
# has emptied Redis; deleted in the foreground, which is Pulumi's way, Kubernetes would take the job away that does it.
_TOLD: Mapping[str, dict[str, str]] = {
    "Service": {"pulumi.com/skipAwait": "true"},
    "StatefulSet": {"pulumi.com/skipAwait": "true"},
    "RayService": {"pulumi.com/deletionPropagationPolicy": "background"},
}
_DELETION_MARGIN_S = 900


class Addons(pulumi.ComponentResource):
    """Charts, objects and the service, each after the one before it and all of them after the cluster.

    So they are made in the order in which they are to be installed, and taken down in the reverse of it. `config` is
    the service's, as `read_config` gives it.
    """

    def __init__(self, cluster: GpuCluster, config: Object) -> None:
        super().__init__("serve-app:infra:Addons", cluster.name("addons"))
        spec, outputs, access = cluster.spec, cluster.outputs, cluster.access()
        self._named = cluster.name
        # A namespace goes with its last pod, and a worker with its last stream.
        self._timeouts = pulumi.CustomTimeouts(delete=f"{longest_request_s(config) + _DELETION_MARGIN_S}s")
        self._kubernetes = kubernetes.Provider(
            cluster.name("kubernetes"),
            kubeconfig=kubeconfig(access),
            cluster_identifier=access.server,  # a new certificate is not a new cluster
            opts=pulumi.ResourceOptions(parent=self, depends_on=[cluster]),
        )
        self._last: list[pulumi.Resource] = []
        for document in beside(spec, outputs.identity):
            self._object(document)
        for chart in charts(spec):
            self._release(chart)
        image = pulumi.Output.from_input(outputs.registry).apply(lambda registry: image_in(spec, registry))
        self._object(rayservice(spec, cluster.catalogue, config, image))
        self.register_outputs({})

    def _after(self) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(
            parent=self, provider=self._kubernetes, depends_on=self._last, custom_timeouts=self._timeouts
        )

    def _object(self, document: Object) -> None:
        """As it is in a manifest; the SDK has a class for each kind, and wants it in words of its own."""
        version, kind, metadata = document["apiVersion"], document["kind"], document["metadata"]
        if kind in _TOLD:
            metadata = {**metadata, "annotations": {**metadata.get("annotations", {}), **_TOLD[kind]}}
        made = pulumi.CustomResource(
            f"kubernetes:{version if '/' in version else f'core/{version}'}:{kind}",
            self._named(kind.lower(), metadata["name"]),
            {**document, "metadata": metadata},
            self._after(),
        )
        self._last = [made]

    def _release(self, chart: Chart) -> None:
        """Like `helm upgrade --install` it does not wait until everything runs: Grafana's password is made by hand."""
        made = Release(
            self._named("release", chart.release),
            name=chart.release,
            chart=chart.chart,
            version=chart.version,
            repository_opts=RepositoryOptsArgs(repo=chart.repository),
            namespace=chart.namespace,
            create_namespace=True,
            values=chart.values,
            skip_await=True,
            opts=self._after(),
        )
        self._last = [made]


def kubeconfig(access: Access) -> pulumi.Output[str]:
    """Without credentials: whoever runs Pulumi gets a token by the cloud's own program, with rights of their own."""
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
                    "cluster": {"server": access.server, "certificate-authority-data": access.authority},
                }
            ],
            "users": [{"name": name, "user": {"exec": token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }
    )
