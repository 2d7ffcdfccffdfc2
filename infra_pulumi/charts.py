"""The Helm charts that the service needs: pinned versions, and the values that differ from the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra_pulumi.objects import MONITORING_NAMESPACE, OPERATOR_NAMESPACE
from infra_pulumi.spec import POOL_LABEL, ClusterSpec

ALERTMANAGER_CONFIG_SECRET = "serve-app-alertmanager"  # secret: configuration, message templates
ALERTMANAGER_CREDENTIALS_SECRET = "serve-app-alerts"  # secret: keys and tokens that it names

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
    """Values that schedule a DaemonSet on all GPU nodes, whatever their taints, and on no other node."""
    pools = [pool.name for pool in spec.gpu_pools]
    term = {"matchExpressions": [{"key": POOL_LABEL, "operator": "In", "values": pools}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return {"affinity": {"nodeAffinity": required}, "tolerations": [{"operator": "Exists"}]}


def kuberay(spec: ClusterSpec) -> Chart:
    """The KubeRay operator for all namespaces, with two replicas: one leads, the other takes over if it fails."""
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
    """NVIDIA's device plugin, which registers a node's GPUs. The node image contains the driver."""
    return Chart(
        "nvidia-device-plugin",
        "nvidia-device-plugin",
        "https://nvidia.github.io/k8s-device-plugin",
        "0.20.0",
        "nvidia-device-plugin",
        {**_gpu_nodes(spec), "failOnInitError": True},
    )


def dcgm_exporter(spec: ClusterSpec) -> Chart:
    """NVIDIA's exporter of GPU metrics per pod, which the resource dashboard shows."""
    monitor: Values = {"enabled": spec.addons.prometheus}
    if spec.addons.prometheus:
        monitor["additionalLabels"] = {"release": "prometheus"}
    values = {**_gpu_nodes(spec), "serviceMonitor": monitor}
    if spec.provider == "gcp":  # the driver is on the host; only kube-system may have critical pods
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
    """Prometheus, Alertmanager and Grafana. The monitors and rules of cluster/monitoring/ select this release's name.

    The rules need scrapes and evaluations every 15 s and, for error budgets, 30 days of data. The control plane belongs
    to the cloud and cannot be scraped. Grafana's password is a secret that no file contains.

    The rules expect the jobs `prometheus` and `alertmanager`. The chart's own rules for both expect other job names, so
    they are disabled; so is its Watchdog alert, because the dead-man's switch must receive only this project's.
    """
    replaced_rules = ("alertmanager", "general", "prometheus")
    managed_by_cloud = ("etcd", "kubeControllerManager", "kubeProxy", "kubeSchedulerAlerting", "kubeSchedulerRecording")
    disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}}
    not_scraped = ("kubeControllerManager", "kubeEtcd", "kubeProxy", "kubeScheduler")
    return Chart(
        "prometheus",
        "kube-prometheus-stack",
        "https://prometheus-community.github.io/helm-charts",
        "88.5.3",
        MONITORING_NAMESPACE,
        {
            "alertmanager": {
                "serviceMonitor": _as_job("alertmanager"),
                # The chart's default configuration notifies no receiver. docs/operations.md describes how to
                # create the two secrets. Both are mounted, so that Alertmanager does not start without them; otherwise
                # the operator would use a default configuration, again without receivers.
                "alertmanagerSpec": {
                    "useExistingSecret": True,
                    "configSecret": ALERTMANAGER_CONFIG_SECRET,
                    "secrets": [ALERTMANAGER_CREDENTIALS_SECRET, ALERTMANAGER_CONFIG_SECRET],
                },
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
            "defaultRules": {"rules": dict.fromkeys((*replaced_rules, *managed_by_cloud), False)},
            **{part: {"enabled": False} for part in not_scraped},
        },
    )


def cluster_autoscaler(spec: ClusterSpec) -> Chart:
    """The cluster autoscaler of AWS, which finds node groups by tags. GKE and AKS include an autoscaler.

    EKS Pod Identity grants rights to its service account by the name below.
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
    """The charts that the description enables, in installation order.

    Prometheus comes first, because it defines the ServiceMonitor kind that the other charts use.
    """
    addons, enabled = spec.addons, list[Chart]()
    if addons.prometheus:
        enabled.append(prometheus())
    if addons.cluster_autoscaler and spec.provider == "aws":
        enabled.append(cluster_autoscaler(spec))
    if addons.device_plugin and spec.provider != "gcp":
        enabled.append(device_plugin(spec))
    if addons.dcgm_exporter:
        enabled.append(dcgm_exporter(spec))
    if addons.kuberay:
        enabled.append(kuberay(spec))
    return enabled
