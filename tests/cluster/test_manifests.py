"""Manifests and Helm values: schemas of Kubernetes and KubeRay, and the properties that the service needs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from infra_pulumi import pod_resources, render
from infra_pulumi.__main__ import main
from infra_pulumi.charts import charts
from infra_pulumi.objects import network_policies, service_account
from infra_pulumi.rayservice import POD_START_S, RAY_POD, rayservice
from infra_pulumi.serve_config import cluster_config, longest_request_s, read_config, server_ports
from infra_pulumi.spec import POOL_LABEL, SpecError
from serve_app import cache_config, database_config, quota_config
from tests.cluster.helpers import (
    CATALOGUE,
    CLOUDS,
    CLUSTER,
    CONFIG,
    ROOT,
    Json,
    changed,
    description,
    documents,
    pod_monitors,
    prometheus_rule,
    rendered,
    service,
)

KUBERAY = json.loads(Path(__file__).with_name("kuberay-rayservice.json").read_text())
KUBERNETES = "1.35"  # the version in the descriptions
EXAMPLE = "cluster/examples/aws"


def pods(document: Json) -> Iterator[Json]:
    """The pod templates of a RayService: the head's first, then the workers'."""
    ray = document["spec"]["rayClusterConfig"]
    yield ray["headGroupSpec"]["template"]
    for group in ray["workerGroupSpecs"]:
        yield group["template"]


def worker(document: Json) -> Json:
    """The pod template of the last worker group."""
    *_, template = pods(document)
    return template


def objects(cloud: str, kind: str) -> dict[str, Json]:
    """The objects of a kind in namespace.yaml, by name."""
    found = documents(cloud, "kubernetes/namespace.yaml")
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


def values(cloud: str, release: str) -> Json:
    """The Helm values of a release."""
    (path,) = (path for path in rendered(cloud) if re.fullmatch(rf"kubernetes/values/\d-{release}\.yaml", path))
    return documents(cloud, path)[0]


def port_numbers(container: Json) -> dict[str, int]:
    """The ports of a container by name."""
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def validate(document: Json) -> None:
    """Validate an object with Kubernetes' own schema; unknown keys are errors."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_example_in_the_repository_is_up_to_date() -> None:
    folder = ROOT / EXAMPLE
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    command = f"python -m infra_pulumi render --spec cluster/descriptions/aws.yaml --output {EXAMPLE}"
    assert found == rendered("aws", EXAMPLE), command


def test_files_are_written_completely_and_their_paths_are_returned(tmp_path: Path) -> None:
    assert list(render.write({"a/b.yaml": "c: 1\n"}, tmp_path)) == [tmp_path / "a/b.yaml"]
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b.yaml"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_rayservice_matches_kuberays_schema(cloud: str) -> None:
    jsonschema.validate(service(cloud), KUBERAY["schema"])


@pytest.mark.parametrize(
    "path", [("spec", "upgradStrategy"), ("spec", "rayClusterConfig", "autoscalerOptions", "idleTimeout")]
)
def test_kuberays_schema_refuses_unknown_keys(path: tuple[str, ...]) -> None:
    document = service("aws")
    section = document
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        jsonschema.validate(document, KUBERAY["schema"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_other_objects_match_kubernetes_schemas(cloud: str) -> None:
    for document in documents(cloud, "kubernetes/namespace.yaml"):
        validate(document)
    for template in pods(service(cloud)):
        validate({"apiVersion": "v1", "kind": "Pod", **with_name(template)})


def with_name(template: Json) -> Json:
    return {"metadata": {"name": "a", **template["metadata"]}, "spec": template["spec"]}


def test_kubernetes_schemas_refuse_unknown_keys() -> None:
    document = copy.deepcopy(objects("aws", "StatefulSet")["serve-app-redis"])
    document["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_rendered_config_differs_from_the_file_only_where_a_cluster_needs_it(cloud: str) -> None:
    expected = read_config(CONFIG)
    expected["http_options"]["host"] = "0.0.0.0"
    args = expected["applications"][0]["args"]
    args["ingress"]["num_cpus"] = 1
    args["auth"] = {"allow_anonymous": True}
    (model,) = args["models"]
    assert model["device"] == "auto"
    model["device"] = "cuda"
    model["resources"]["num_gpus"] = 1
    model["deployment"]["autoscaling"]["max_replicas"] = description(cloud).gpu_pools[0].max
    assert yaml.safe_load(service(cloud)["spec"]["serveConfigV2"]) == expected
    assert documents(cloud, "ray-up/serve.yaml") == [expected]


def test_a_config_for_a_cluster_says_who_may_use_the_service() -> None:
    config, spec = read_config(CONFIG), description("aws")
    args = config["applications"][0]["args"]
    exposed = spec.model_copy(update={"addons": spec.addons.model_copy(update={"network_policy": False})})
    with pytest.raises(SpecError, match="every pod of the cluster reaches the service"):
        cluster_config(exposed, CATALOGUE, config)
    args["auth"] = {}
    with pytest.raises(SpecError, match=r"`auth` needs `database\.url`"):
        cluster_config(spec, CATALOGUE, config)
    args["database"] = {"url": "postgresql+psycopg://serve@db/serve"}
    for one in (spec, exposed):
        assert cluster_config(one, CATALOGUE, config)["applications"][0]["args"]["auth"] == {}


@pytest.mark.parametrize(
    ("urls", "ports"),
    [
        ({}, [443]),
        ({"database": None, "quotas": None}, [443]),
        ({"database": "postgresql+psycopg://me@db/serve"}, [443, 5432]),
        ({"database": "postgresql://db:6000/serve", "quotas": "redis://counters"}, [443, 6000, 6379]),
        ({"quotas": "rediss://one:7000", "response_cache": "rediss://other:7000"}, [443, 7000]),
    ],
)
def test_pods_reach_the_servers_of_the_config(urls: dict[str, str | None], ports: list[int]) -> None:
    config = read_config(CONFIG)
    config["applications"][0]["args"] |= {section: {"url": url} for section, url in urls.items()}
    policies = network_policies(description("aws"), server_ports(config))
    (policy,) = (one for one in policies if one["metadata"]["name"] == "serve-app")
    (rule,) = (one for one in policy["spec"]["egress"] if "except" in str(one))
    assert [port["port"] for port in rule["ports"]] == ports


def test_pods_get_the_password_of_each_server_of_a_config() -> None:
    """The names of the variables are those that the service reads."""
    read = {database_config.PASSWORD_VARIABLE, quota_config.PASSWORD_VARIABLE, cache_config.PASSWORD_VARIABLE}
    containers = service("aws")["spec"]["rayClusterConfig"]
    groups = [containers["headGroupSpec"], *containers["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        names = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each}
        assert read <= set(names)
        assert all(names[name]["optional"] for name in read), "a config without such a server needs no secret"


@pytest.mark.parametrize(("num_cpus", "reserved"), [(None, 1), (0, 1), (0.5, 0.5), (2, 2)])
def test_an_ingress_deployment_reserves_a_cpu(num_cpus: float | None, reserved: float) -> None:
    """Ray's head has no CPU to reserve, so that the ingress runs on a worker."""
    config = read_config(CONFIG)
    ingress = {"deployment": {"num_replicas": 1}} | ({} if num_cpus is None else {"num_cpus": num_cpus})
    config["applications"][0]["args"]["ingress"] = ingress
    adapted = cluster_config(description("aws"), CATALOGUE, config)["applications"][0]["args"]["ingress"]
    assert adapted == {"deployment": {"num_replicas": 1}, "num_cpus": reserved}


@pytest.mark.parametrize("ingress", [None, {}])
def test_an_ingress_with_default_values_reserves_a_cpu(ingress: dict[str, Any] | None) -> None:
    config = read_config(CONFIG)
    config["applications"][0]["args"]["ingress"] = ingress
    adapted = cluster_config(description("aws"), CATALOGUE, config)["applications"][0]["args"]["ingress"]
    assert adapted == {"num_cpus": 1}


def test_values_in_the_config_have_priority_over_the_adaptation() -> None:
    config = read_config(CONFIG)
    (model,) = config["applications"][0]["args"]["models"]
    model["resources"]["num_gpus"] = 0.5
    (shared,) = cluster_config(description("aws"), CATALOGUE, config)["applications"][0]["args"]["models"]
    assert shared["resources"]["num_gpus"] == 0.5
    assert shared["deployment"]["autoscaling"]["max_replicas"] == 8, "two replicas on each of four GPUs"
    model["deployment"]["autoscaling"]["max_replicas"] = 3
    (bounded,) = cluster_config(description("aws"), CATALOGUE, config)["applications"][0]["args"]["models"]
    assert bounded["deployment"]["autoscaling"]["max_replicas"] == 3
    model["device"] = "cpu"
    (on_cpu,) = cluster_config(description("aws"), CATALOGUE, config)["applications"][0]["args"]["models"]
    assert on_cpu == model


def test_an_invalid_config_is_refused_with_a_message(tmp_path: Path) -> None:
    template = "applications: [{args: {models: [%s]%s}}]"
    invalid = (
        "",
        "applications: 3",
        "applications: []",
        "a: [",
        "applications: [{name: x}]",
        template % ("", ""),
        template % ("{resources: 3}", ""),
        template % ("{deployment: {autoscaling: {max_replicas: many}}}", ""),
        template % ("{name: x}", ", limits: {request_timeout_s: ten}"),
        template % ("{resources: {num_gpus: '1'}}", ""),
        template % ("{name: x}", ", ingress: {num_cpus: one}"),
    )
    for text in invalid:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(SpecError, match=r"serve\.config: "):
            read_config(tmp_path / "c.yaml")
    with pytest.raises(SpecError, match="No such file"):
        read_config(tmp_path / "none.yaml")


def test_empty_sections_of_a_config_get_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("applications: [{args: {limits:, models: [{name: x, resources:, deployment:}]}}]")
    config = read_config(tmp_path / "c.yaml")
    assert longest_request_s(config) == 600
    (model,) = cluster_config(description("aws"), CATALOGUE, config)["applications"][0]["args"]["models"]
    assert model["resources"] == {"num_gpus": 1}
    assert model["deployment"] == {"autoscaling": {"max_replicas": 4}}


def test_a_fixed_number_of_replicas_is_kept(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("applications: [{args: {models: [{name: x, deployment: {num_replicas: 2}}]}}]")
    (model,) = cluster_config(description("aws"), CATALOGUE, read_config(tmp_path / "c.yaml"))["applications"][0][
        "args"
    ]["models"]
    assert model["deployment"] == {"num_replicas": 2}


def test_pods_leave_the_name_label_to_kuberay() -> None:
    """The head's service selects its pod by KubeRay's name label (kuberay#2648)."""
    cluster = service("aws")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "app.kubernetes.io/name" not in group["template"]["metadata"]["labels"]
        assert group["template"]["metadata"]["labels"].items() >= RAY_POD.items()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_time_limit_exceeds_the_longest_request(cloud: str) -> None:
    document = service(cloud)
    longest = read_config(CONFIG)["applications"][0]["args"]["limits"]["request_timeout_s"]
    spec = worker(document)["spec"]
    (container,) = spec["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["/opt/serve_app/drain", str(longest)]
    assert spec["terminationGracePeriodSeconds"] > longest
    assert document["spec"]["rayClusterDeletionDelaySeconds"] > longest, "the previous cluster must finish its requests"
    assert document["spec"]["excludeHeadPodFromServeSvc"], "a restart of the head must not interrupt streams"
    (hard,) = (each["value"] for each in container["env"] if each["name"] == "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S")
    assert int(hard) > longest


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_needs_a_token_and_its_dashboard_is_not_exposed(cloud: str) -> None:
    ray = service(cloud)["spec"]["rayClusterConfig"]
    assert ray["authOptions"] == {"mode": "token", "secretName": "serve-app-ray-token"}
    head = ray["headGroupSpec"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    (redis,) = objects(cloud, "Service").values()
    assert redis["spec"].get("type", "ClusterIP") == "ClusterIP"
    text = "".join(text for path, text in rendered(cloud).items() if path.startswith("kubernetes/"))
    assert re.findall(r"LoadBalancer|NodePort|kind: (?:Secret|Ingress)\b", text) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_new_head_restores_its_state_from_redis(cloud: str) -> None:
    ray = service(cloud)["spec"]["rayClusterConfig"]
    address, _, port = ray["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    redis = objects(cloud, "Service")[address]["spec"]
    store = objects(cloud, "StatefulSet")["serve-app-redis"]["spec"]
    assert redis["ports"][0]["port"] == int(port)
    assert redis["selector"].items() <= store["template"]["metadata"]["labels"].items()
    assert store["volumeClaimTemplates"], "without a volume the state is lost with Redis' node"
    head = next(pods(service(cloud)))
    affinity = head["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (rule,) = affinity["nodeSelectorTerms"][0]["matchExpressions"]
    assert rule == {"key": POOL_LABEL, "operator": "NotIn", "values": ["gpu"]}, "GPU pools may have spot nodes"
    assert "tolerations" not in head["spec"]
    budget = objects(cloud, "PodDisruptionBudget")["serve-app-head"]["spec"]
    labels = {**head["metadata"]["labels"], "ray.io/node-type": "head"}
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_aws_has_an_encrypted_default_storage_class() -> None:
    (storage_class,) = objects("aws", "StorageClass").values()
    assert storage_class["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    assert storage_class["parameters"]["encrypted"] == "true"
    assert objects("gcp", "StorageClass") == objects("azure", "StorageClass") == {}


def test_the_start_limit_of_a_pod_exceeds_the_start_of_a_node() -> None:
    ray = service("aws")["spec"]["rayClusterConfig"]
    env = {each["name"]: each["value"] for each in ray["autoscalerOptions"]["env"]}
    assert int(env["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"]) == POD_START_S >= 2 * 600


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_run_only_on_their_pool(cloud: str) -> None:
    spec = worker(service(cloud))["spec"]
    assert spec["nodeSelector"] == {POOL_LABEL: "gpu"}
    tolerated = {each["key"] for each in spec["tolerations"]}
    spot = {
        "aws": set(),
        "gcp": {"cloud.google.com/gke-spot"},
        "azure": {"kubernetes.azure.com/scalesetpriority"},
    }
    assert tolerated == {"nvidia.com/gpu"} | spot[cloud]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    assert {"name": "shared-mem", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_workers_tolerate_the_taints_of_the_description() -> None:
    taint = {"key": "team", "value": "a", "effect": "NoExecute"}
    document = rayservice(changed("aws", pool={"taints": [taint]}), CATALOGUE, read_config(CONFIG))
    assert {"operator": "Equal", **taint} in worker(document)["spec"]["tolerations"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_pods_have_no_privileges_on_their_node(cloud: str) -> None:
    store = objects(cloud, "StatefulSet")["serve-app-redis"]["spec"]["template"]
    for template in (*pods(service(cloud)), store):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"]
    (namespace,) = objects(cloud, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_pods_have_the_ports_of_prometheus_monitors(cloud: str) -> None:
    service_monitor, ray_monitor = pod_monitors()
    head, *workers = (template["spec"]["containers"][0] for template in pods(service(cloud)))
    assert {each["port"] for each in service_monitor["spec"]["podMetricsEndpoints"]} <= set(port_numbers(head))
    assert {each["port"] for each in ray_monitor["spec"]["podMetricsEndpoints"]} <= set(port_numbers(head))
    assert all("metrics" in port_numbers(each) for each in workers)
    required = {port_numbers(head)[name] for name in ("serve", "metrics", "as-metrics", "dash-metrics")}
    rules = objects(cloud, "NetworkPolicy")["serve-app"]["spec"]["ingress"]
    (prometheus,) = (rule for rule in rules if "monitoring" in str(rule["from"]))
    assert {port["port"] for port in prometheus["ports"]} == required


@pytest.mark.parametrize("cloud", CLOUDS)
def test_only_ray_the_operator_and_prometheus_reach_rays_ports(cloud: str) -> None:
    policies = objects(cloud, "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for rule in policies["serve-app"]["spec"]["ingress"]:
        assert rule["from"], "an empty list allows all addresses"
        assert all("ipBlock" not in peer for peer in rule["from"])
        open_ports = {port["port"] for port in rule.get("ports", [])}
        if "serve-app/caller" in str(rule["from"]):
            assert open_ports == {8000}
    assert len(policies["serve-app-redis"]["spec"]["ingress"]) == 1
    assert "egress" not in policies["serve-app-redis"]["spec"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_outbound_traffic_is_https_and_excludes_the_nodes_metadata(cloud: str) -> None:
    (policy,) = (each for each in network_policies(description(cloud)) if each["metadata"]["name"] == "serve-app")
    blocks = [
        (peer["ipBlock"], [port["port"] for port in rule["ports"]])
        for rule in policy["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    (anywhere, ports), *rest = blocks
    assert ports == [443]
    assert anywhere["except"] == ["169.254.0.0/16"]
    assert [block["cidr"] for block, _ in rest] == {
        "aws": ["169.254.170.23/32"],
        "gcp": ["169.254.169.254/32"],
        "azure": [],
    }[cloud]


@pytest.mark.parametrize(
    ("cloud", "annotations"),
    [
        ("aws", {}),
        ("gcp", {"iam.gke.io/gcp-service-account": "identity"}),
        ("azure", {"azure.workload.identity/client-id": "identity"}),
    ],
)
def test_the_service_account_has_the_cloud_identity(cloud: str, annotations: dict[str, str]) -> None:
    account = service_account(description(cloud), "identity")
    assert account["metadata"].get("annotations", {}) == annotations
    validate(account)
    has_label = "azure.workload.identity/use" in worker(service(cloud))["metadata"]["labels"]
    assert has_label == (cloud == "azure")


def test_disabled_addons_are_not_rendered(tmp_path: Path) -> None:
    config = read_config(CONFIG)
    config["applications"][0]["args"]["auth"] = {"allow_anonymous": True}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    addons = {"network_policy": False, "disruption_budget": False, "prometheus": False, "dcgm_exporter": False}
    spec = changed("aws", addons=addons)
    files = render.manifests(spec, CATALOGUE, file)
    kinds = {each["kind"] for each in yaml.safe_load_all(files["namespace.yaml"])}
    assert kinds == {"Namespace", "ServiceAccount", "Service", "StatefulSet", "StorageClass"}
    assert [chart.release for chart in charts(spec)] == [
        "cluster-autoscaler",
        "nvidia-device-plugin",
        "kuberay-operator",
    ]
    assert "serviceMonitor" not in str(charts(spec)[-1].values)


def test_the_command_writes_the_rendered_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # serve.config is relative to the working folder
    assert main(["render", "--spec", str(CLUSTER / "descriptions/gcp.yaml"), "--output", str(tmp_path)]) == 0
    printed = {line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()}
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert printed == {str(tmp_path / name) for name in found}
    assert found == rendered("gcp", str(tmp_path))


def test_every_fault_of_a_description_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "invalid.yaml"
    source.write_text("provider: aws\nregion: mars\ngpu_pools: [{instance_types: [g5.xlarge], min: 5}]\n")
    assert main(["render", "--spec", str(source), "--output", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err
    assert "region: 'mars' is not a region of aws" in output
    assert "gpu_pools.0.max: 4 is below min 5" in output
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_created_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG.read_text())
    source = tmp_path / "cluster.yaml"
    source.write_text((CLUSTER / "descriptions/aws.yaml").read_text() + f"serve: {{config: {config}}}\n")
    assert main(["render", "--spec", str(source), "--output", str(tmp_path / "out")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_values_file_has_its_helm_command(cloud: str) -> None:
    files = {path: text for path, text in rendered(cloud).items() if path.startswith("kubernetes/values/")}
    assert len(files) == len(charts(description(cloud)))
    for path, text in files.items():
        _, command, *_ = text.splitlines()
        assert re.fullmatch(
            r"# helm upgrade --install (\S+) \S+ --repo https://\S+ --version \d+\.\d+\.\d+ --namespace \S+ "
            rf"--create-namespace --values {re.escape(path.removeprefix('kubernetes/'))}",
            command,
        )


def test_prometheus_is_installed_before_its_monitors() -> None:
    releases = [chart.release for chart in charts(description("aws"))]
    assert releases[0] == "prometheus"
    labels = {each["metadata"]["labels"]["release"] for each in (*pod_monitors(), prometheus_rule())}
    assert labels == {"prometheus"}, "kube-prometheus-stack selects its release's name"


def test_prometheus_jobs_have_the_names_in_the_rules() -> None:
    """The chart's own Watchdog alert is off, because it would continue without this project's rules."""
    chart = values("aws", "prometheus")
    required = set(re.findall(r'up\{job="(\w+)"\}', json.dumps(prometheus_rule()).replace('\\"', '"')))
    of_chart = {
        rule["replacement"]
        for part in ("alertmanager", "prometheus")
        for rule in chart[part]["serviceMonitor"]["relabelings"]
    }
    monitors = {
        rule["replacement"]
        for document in pod_monitors()
        for endpoint in document["spec"]["podMetricsEndpoints"]
        for rule in endpoint["relabelings"]
        if rule.get("targetLabel") == "job"
    }
    assert required <= of_chart | monitors
    assert chart["defaultRules"]["rules"]["general"] is False
    assert chart["prometheus"]["prometheusSpec"]["retention"] == "35d"


def test_gke_needs_no_charts_for_the_device_plugin_and_the_autoscaler() -> None:
    assert [chart.release for chart in charts(description("gcp"))] == [
        "prometheus",
        "dcgm-exporter",
        "kuberay-operator",
    ]


@pytest.mark.parametrize(
    ("memory_gib", "minimum", "maximum"),
    [(16, 11, 12), (32, 26, 28), (64, 55, 59), (768, 700, 740)],
)
def test_the_allocatable_memory_leaves_the_nodes_reserve(memory_gib: float, minimum: float, maximum: float) -> None:
    """For 16 GiB by hand: 15.36 visible - (1 + 0.8 + 0.736) reserved - 0.1 eviction - 1 for DaemonSets = 11.724."""
    assert minimum < pod_resources.allocatable_gib(memory_gib) < maximum
    assert pod_resources.allocatable_gib(16) == pytest.approx(11.724)


def test_a_pool_with_alternatives_has_the_resources_of_the_smallest() -> None:
    spec = changed("aws", pool={"instance_types": ["g5.4xlarge", "g5.xlarge"]})
    assert pod_resources.pod_size(spec, CATALOGUE, 0) == pod_resources.PodSize(
        cpus=3, cpu_limit=4, memory_gib=11, gpus=1
    )


def test_an_unknown_machine_is_refused_before_files_are_rendered() -> None:
    with pytest.raises(SpecError, match=r"gpu_pools\.0\.instance_types\.0"):
        render.manifests(changed("aws", pool={"instance_types": ["g5.9xlarge"]}), CATALOGUE, CONFIG)
    assert CATALOGUE.find("aws", "g5.9xlarge") is None


def test_an_image_with_a_digest_keeps_it() -> None:
    image = "registry.host:5000/a/serve-app@sha256:" + "0" * 64
    spec = changed("aws", serve={"image": image})
    files = render.manifests(spec, CATALOGUE, CONFIG)
    (replacement,) = yaml.safe_load(files["kustomization.yaml"])["images"]
    assert replacement == {
        "name": "registry.host:5000/a/serve-app",
        "newName": "registry.host:5000/a/serve-app",
        "digest": "sha256:" + "0" * 64,
    }
    assert image in files["rayservice.yaml"]


def test_kuberays_schema_has_the_version_of_the_operator() -> None:
    (operator,) = (chart for chart in charts(description("aws")) if chart.release == "kuberay-operator")
    assert KUBERAY["kuberay"] == operator.version
    assert operator.values["image"]["tag"] == f"v{operator.version}"
    assert (ROOT / "tests/cluster/reduce_crd.py").exists()


def test_all_objects_are_in_the_clusters_namespace() -> None:
    files = render.manifests(changed("aws", name="other"), CATALOGUE, CONFIG)
    found = [each for name in ("namespace.yaml", "rayservice.yaml") for each in yaml.safe_load_all(files[name])]
    found = [each for each in found if each["kind"] != "StorageClass"]  # it has no namespace
    namespaces = {each["metadata"].get("namespace") or each["metadata"]["name"] for each in found}
    assert namespaces == {"other"}
    (account,) = (each["metadata"]["name"] for each in found if each["kind"] == "ServiceAccount")
    assert worker(found[-1])["spec"]["serviceAccountName"] == account == "serve-app"


def test_spot_machines_on_gcp_are_deleted_when_they_are_preempted() -> None:
    """The API of Compute Engine refuses a spot machine that restarts automatically."""
    nodes = documents("gcp", "ray-up/gcp.yaml")[0]["available_node_types"].values()
    (spot,) = [config for node in nodes if "provisioningModel" in (config := node["node_config"].get("scheduling", {}))]
    assert spot == {
        "onHostMaintenance": "TERMINATE",
        "provisioningModel": "SPOT",
        "automaticRestart": False,
        "instanceTerminationAction": "DELETE",
    }


def test_the_gpu_exporter_on_gcp_reads_the_driver_of_the_host() -> None:
    found = values("gcp", "dcgm-exporter")
    assert found["securityContext"] == {"privileged": True}
    assert {"name": "nvidia", "hostPath": "/home/kubernetes/bin/nvidia"} in found["extraHostVolumes"]
