"""The Helm charts under the service: versions, and only those values that differ from the charts' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra_pulumi.objects import MONITORING_NAMESPACE, OPERATOR_NAMESPACE
from infra_pulumi.spec import POOL_LABEL, ClusterSpec

ROUTES = "serve-app-alertmanager"  # the secret with Alertmanager's configuration and the texts of its messages
RECEIVERS = "serve-app-alerts"  # that with the keys, addresses and tokens which the configuration names

Values = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One release: `helm upgrade --install RELEASE CHART --repo REPOSITORY --version VERSION -n NAMESPACE`."""

    release: str
    chart: str
    repository: str
    version: str
    namespace: str
    values: Values


def _gpu_nodes(spec: ClusterSpec) -> Values:
    """On nodes of GPU pools, whatever their taints, and nowhere else."""
    pools = [pool.name for pool in spec.gpu_pools]
    term = {"matchExpressions": [{"key": POOL_LABEL, "operator": "In", "values": pools}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return {"affinity": {"nodeAffinity": required}, "tolerations": [{"operator": "Exists"}]}


def kuberay(spec: ClusterSpec) -> Chart:
    """It watches all namespaces; its leader is elected, so that two share one work and one may go."""
    values: Values = {
        "replicas": 2,
        "image": {"repository": "quay.io/kuberay/operator", "tag": "v1.7.0"},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "500m", "memory": "512Mi"}},
    }
    if spec.addons.prometheus:
        values["metrics"] = {"serviceMonitor": {"enabled": True, "additionalLabels": {"release": "prometheus"}}}
    return Chart(
        "kuberay-operator",
        "kuberay-operator",
        "https://ray-project.github.io/kuberay-helm/",
        "1.7.0",
        OPERATOR_NAMESPACE,
        values,
    )


def device_plugin(spec: ClusterSpec) -> Chart:
    """Tells Kubernetes of a node's GPUs. The driver is in the node's image."""
    return Chart(
        "nvidia-device-plugin",
        "nvidia-device-plugin",
        "https://nvidia.github.io/k8s-device-plugin",
        "0.20.0",
        "nvidia-device-plugin",
        {**_gpu_nodes(spec), "failOnInitError": True},
    )


def dcgm_exporter(spec: ClusterSpec) -> Chart:
    """GPU metrics by pod, for the dashboards of machines."""
    monitor: Values = {"enabled": spec.addons.prometheus}
    if spec.addons.prometheus:
        monitor["additionalLabels"] = {"release": "prometheus"}
    values = {**_gpu_nodes(spec), "serviceMonitor": monitor}
    if spec.provider == "gcp":  # its driver is on the host only, and critical pods are for kube-system
        values["extraHostVolumes"] = [{"name": "nvidia", "hostPath": "/home/kubernetes/bin/nvidia"}]
        values["extraVolumeMounts"] = [
            {
                "name": "exporter-metrics-volume",
                "mountPath": "/etc/dcgm-exporter/default-counters.csv",
                "subPath": "default-counters.csv",
            },
            {"name": "nvidia", "mountPath": "/usr/local/nvidia", "readOnly": True},
        ]
        values["extraEnv"] = [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}]
        values["securityContext"] = {"privileged": True}
        values["priorityClassName"] = ""
    return Chart(
        "dcgm-exporter",
        "dcgm-exporter",
        "https://nvidia.github.io/dcgm-exporter/helm-charts",
        "4.8.3",
        MONITORING_NAMESPACE,
        values,
    )


def _as_job(name: str) -> Values:
    return {"relabelings": [{"targetLabel": "job", "replacement": name}]}


def prometheus() -> Chart:
    """What cluster/monitoring/ is for: its PodMonitors and rules carry `release: prometheus`, the release's name.

    Scrapes and evaluations are 15 s apart, as the rules' times need; error budgets look back 30 days. The cloud runs
    the control plane, so its parts cannot be scraped. Grafana's password is a secret that is never in a file.

    The rules know Prometheus and Alertmanager as jobs of these names; the chart's own rules about the two, which know
    them by others, are left out, and so is its Watchdog, or the dead-man's switch would hear the wrong one.
    """
    watchdog_and_jobs = ("alertmanager", "general", "prometheus")
    unseen = ("etcd", "kubeControllerManager", "kubeProxy", "kubeSchedulerAlerting", "kubeSchedulerRecording")
    disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}}
    hidden = ("kubeControllerManager", "kubeEtcd", "kubeProxy", "kubeScheduler")
    return Chart(
        "prometheus",
        "kube-prometheus-stack",
        "https://prometheus-community.github.io/helm-charts",
        "88.5.3",
        MONITORING_NAMESPACE,
        {
            "alertmanager": {
                "serviceMonitor": _as_job("alertmanager"),
                # The chart's own configuration tells nobody anything. cluster/monitoring/README.md says how the two are
                # made. Both are mounted, so that without one it does not start: the operator would put a configuration
                # in its place that tells nobody either.
                "alertmanagerSpec": {"useExistingSecret": True, "configSecret": ROUTES, "secrets": [RECEIVERS, ROUTES]},
            },
            "prometheus": {
                "serviceMonitor": _as_job("prometheus"),
                "prometheusSpec": {
                    "scrapeInterval": "15s",
                    "evaluationInterval": "15s",
                    "retention": "35d",
                    "additionalArgs": [{"name": "rules.alert.resend-delay", "value": "15s"}],
                    "resources": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
                    "storageSpec": {"volumeClaimTemplate": {"spec": disk}},
                },
            },
            "grafana": {"admin": {"existingSecret": "grafana-admin"}},
            "defaultRules": {"rules": dict.fromkeys((*watchdog_and_jobs, *unseen), False)},
            **{part: {"enabled": False} for part in hidden},
        },
    )


def cluster_autoscaler(spec: ClusterSpec) -> Chart:
    """Adds and removes AWS' nodes, by the tags of their groups; GKE and AKS bring their own.

    Its service account gets its rights by the name below (EKS Pod Identity).
    """
    return Chart(
        "cluster-autoscaler",
        "cluster-autoscaler",
        "https://kubernetes.github.io/autoscaler",
        "9.59.0",
        "kube-system",
        {
            "cloudProvider": "aws",
            "awsRegion": spec.region,
            "autoDiscovery": {"clusterName": spec.name},
            "rbac": {"serviceAccount": {"name": "cluster-autoscaler"}},
            "extraArgs": {
                "balance-similar-node-groups": True,
                "expander": "least-waste",
                "scale-down-unneeded-time": "5m",
                "skip-nodes-with-local-storage": False,
            },
        },
    )


def charts(spec: ClusterSpec) -> list[Chart]:
    """Those that the description wants, in the order in which they are to be installed.

    Prometheus comes first: it brings the kinds that the others' monitors are of.
    """
    addons, found = spec.addons, []
    if addons.prometheus:
        found.append(prometheus())
    if addons.cluster_autoscaler and spec.provider == "aws":
        found.append(cluster_autoscaler(spec))
    if addons.device_plugin and spec.provider != "gcp":
        found.append(device_plugin(spec))
    if addons.dcgm_exporter:
        found.append(dcgm_exporter(spec))
    if addons.kuberay:
        found.append(kuberay(spec))
    return found
