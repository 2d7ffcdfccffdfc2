"""Manifests and Helm values: what Kubernetes and KubeRay take, and what the service needs of them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from alerts.dashboards import write
from infra_pulumi import catalogue, render, sizes
from infra_pulumi.__main__ import main
from infra_pulumi.charts import charts
from infra_pulumi.objects import network_policies, service_account
from infra_pulumi.rayservice import POD_START_S, RAY_POD, longest_request_s, on_gpus, rayservice, read_config
from infra_pulumi.render import KEPT, ROOT
from infra_pulumi.spec import POOL_LABEL, SpecError
from tests.cluster.world import CLOUDS, CONFIG, KNOWN, Json, changed, description, kept

KUBERAY = json.loads(Path(__file__).with_name("kuberay-rayservice.json").read_text())
KUBERNETES = "1.35"  # as the descriptions have it


def service(cloud: str) -> Json:
    (document,) = kept(f"kubernetes/{cloud}/rayservice.yaml")
    return document


def pods(document: Json) -> Iterator[Json]:
    """The pod templates of a RayService: first the head's, then the workers'."""
    ray = document["spec"]["rayClusterConfig"]
    yield ray["headGroupSpec"]["template"]
    for group in ray["workerGroupSpecs"]:
        yield group["template"]


def worker(document: Json) -> Json:
    *_, template = pods(document)
    return template


def beside(cloud: str, kind: str) -> dict[str, Json]:
    return {each["metadata"]["name"]: each for each in kept(f"kubernetes/{cloud}/beside.yaml") if each["kind"] == kind}


def names(container: Json) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def as_kubernetes(document: Json, version: str = KUBERNETES) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_what_is_kept_is_what_is_rendered() -> None:
    made = render.kept()
    folders = {name.partition("/")[0] for name in made}
    there = {
        path.relative_to(KEPT).as_posix(): path.read_text(encoding="utf-8")
        for folder in folders
        for path in (KEPT / folder).rglob("*")
        if path.is_file()
    }
    assert there == made, "python -m infra_pulumi.render"


def test_files_are_written_as_a_whole_and_told(tmp_path: Path) -> None:
    assert list(render.write({"a/b.yaml": "c: 1\n"}, tmp_path)) == [tmp_path / "a/b.yaml"]
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b.yaml"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_kuberay_takes_the_service(cloud: str) -> None:
    jsonschema.validate(service(cloud), KUBERAY["schema"])


@pytest.mark.parametrize(
    "path", [("spec", "upgradStrategy"), ("spec", "rayClusterConfig", "autoscalerOptions", "idleTimeout")]
)
def test_a_key_that_kuberay_does_not_know_is_found(path: tuple[str, ...]) -> None:
    document = service("aws")
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        jsonschema.validate(document, KUBERAY["schema"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_kubernetes_takes_everything_else(cloud: str) -> None:
    for document in kept(f"kubernetes/{cloud}/beside.yaml"):
        as_kubernetes(document)
    for template in pods(service(cloud)):
        as_kubernetes({"apiVersion": "v1", "kind": "Pod", **named(template)})


def named(template: Json) -> Json:
    return {"metadata": {"name": "a", **template["metadata"]}, "spec": template["spec"]}


def test_a_key_that_kubernetes_does_not_know_is_found() -> None:
    document = copy.deepcopy(beside("aws", "StatefulSet")["serve-app-redis"])
    document["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        as_kubernetes(document)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_config_is_the_repositorys_but_for_what_a_cluster_needs(cloud: str) -> None:
    ours, theirs = read_config(CONFIG), yaml.safe_load(service(cloud)["spec"]["serveConfigV2"])
    (model,) = theirs["applications"][0]["args"]["models"]
    pool = description(cloud).gpu_pools[0]
    assert theirs["http_options"].pop("host") == "0.0.0.0"
    assert model["resources"].pop("num_gpus") == 1
    assert model["deployment"]["autoscaling"].pop("max_replicas") == pool.max
    (mine,) = ours["applications"][0]["args"]["models"]
    assert (model.pop("device"), mine.pop("device")) == ("cuda", "auto")
    del ours["http_options"]["host"], mine["resources"]["num_gpus"], mine["deployment"]["autoscaling"]["max_replicas"]
    assert theirs == ours


def test_a_model_says_itself_what_it_reserves() -> None:
    config = read_config(CONFIG)
    (model,) = config["applications"][0]["args"]["models"]
    model["resources"]["num_gpus"] = 0.5
    (shared,) = on_gpus(description("aws"), KNOWN, config)["applications"][0]["args"]["models"]
    assert shared["resources"]["num_gpus"] == 0.5
    assert shared["deployment"]["autoscaling"]["max_replicas"] == 8, "two on each of four"
    model["deployment"]["autoscaling"]["max_replicas"] = 3
    (bounded,) = on_gpus(description("aws"), KNOWN, config)["applications"][0]["args"]["models"]
    assert bounded["deployment"]["autoscaling"]["max_replicas"] == 3
    model["device"] = "cpu"
    (plain,) = on_gpus(description("aws"), KNOWN, config)["applications"][0]["args"]["models"]
    assert plain == model


def test_a_file_that_is_no_config_is_refused_in_words(tmp_path: Path) -> None:
    some = "applications: [{args: {models: [%s]%s}}]"
    wrong = (
        "",
        "applications: 3",
        "applications: []",
        "a: [",
        "applications: [{name: x}]",
        some % ("", ""),
        some % ("{resources: 3}", ""),
        some % ("{deployment: {autoscaling: {max_replicas: many}}}", ""),
        some % ("{name: x}", ", limits: {request_timeout_s: ten}"),
        some % ("{resources: {num_gpus: '1'}}", ""),
    )
    for text in wrong:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(SpecError, match=r"serve\.config: "):
            read_config(tmp_path / "c.yaml")
    with pytest.raises(SpecError, match="No such file"):
        read_config(tmp_path / "none.yaml")


def test_what_a_config_leaves_empty_is_filled_in(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("applications: [{args: {limits:, models: [{name: x, resources:, deployment:}]}}]")
    config = read_config(tmp_path / "c.yaml")
    assert longest_request_s(config) == 600
    (model,) = on_gpus(description("aws"), KNOWN, config)["applications"][0]["args"]["models"]
    assert model["resources"] == {"num_gpus": 1}
    assert model["deployment"] == {"autoscaling": {"max_replicas": 4}}


def test_a_number_of_replicas_that_is_said_stays(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("applications: [{args: {models: [{name: x, deployment: {num_replicas: 2}}]}}]")
    (model,) = on_gpus(description("aws"), KNOWN, read_config(tmp_path / "c.yaml"))["applications"][0]["args"]["models"]
    assert model["deployment"] == {"num_replicas": 2}


def test_kuberays_own_name_is_left_to_it() -> None:
    """By it the service in front of the head finds its pod (kuberay#2648)."""
    cluster = service("aws")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "app.kubernetes.io/name" not in group["template"]["metadata"]["labels"]
        assert group["template"]["metadata"]["labels"].items() >= RAY_POD.items()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_stream_is_cut_before_its_time(cloud: str) -> None:
    document = service(cloud)
    longest = read_config(CONFIG)["applications"][0]["args"]["limits"]["request_timeout_s"]
    spec = worker(document)["spec"]
    (container,) = spec["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["/opt/serve_app/drain", str(longest)]
    assert spec["terminationGracePeriodSeconds"] > longest
    assert document["spec"]["rayClusterDeletionDelaySeconds"] > longest, "the cluster before it ends what it answers"
    assert document["spec"]["excludeHeadPodFromServeSvc"], "streams through the head would end with it"
    (hard,) = (each["value"] for each in container["env"] if each["name"] == "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S")
    assert int(hard) > longest


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_asks_for_a_token_and_its_dashboard_has_no_way_in(cloud: str) -> None:
    ray = service(cloud)["spec"]["rayClusterConfig"]
    assert ray["authOptions"] == {"mode": "token", "secretName": "serve-app-ray-token"}
    head = ray["headGroupSpec"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    (redis,) = beside(cloud, "Service").values()
    assert redis["spec"].get("type", "ClusterIP") == "ClusterIP"
    everything = "".join(path.read_text() for path in (KEPT / "kubernetes").rglob("*.yaml"))
    assert re.findall(r"LoadBalancer|NodePort|kind: (?:Secret|Ingress)\b", everything) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_lost_head_is_replaced_and_finds_its_workers(cloud: str) -> None:
    ray = service(cloud)["spec"]["rayClusterConfig"]
    address, _, port = ray["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    redis = beside(cloud, "Service")[address]["spec"]
    store = beside(cloud, "StatefulSet")["serve-app-redis"]["spec"]
    assert redis["ports"][0]["port"] == int(port)
    assert redis["selector"].items() <= store["template"]["metadata"]["labels"].items()
    assert store["volumeClaimTemplates"], "what is not on a disk is gone when Redis' node is"
    head = next(pods(service(cloud)))
    away = head["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (rule,) = away["nodeSelectorTerms"][0]["matchExpressions"]
    assert rule == {"key": POOL_LABEL, "operator": "NotIn", "values": ["gpu"]}, "GPU pools may be spot"
    assert "tolerations" not in head["spec"]
    budget = beside(cloud, "PodDisruptionBudget")["serve-app-head"]["spec"]
    labels = {**head["metadata"]["labels"], "ray.io/node-type": "head"}
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_on_aws_there_is_something_to_make_disks_of() -> None:
    (made,) = beside("aws", "StorageClass").values()
    assert made["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    assert made["parameters"]["encrypted"] == "true"
    assert beside("gcp", "StorageClass") == beside("azure", "StorageClass") == {}


def test_a_pod_has_longer_to_start_than_a_fresh_node_takes() -> None:
    ray = service("aws")["spec"]["rayClusterConfig"]
    env = {each["name"]: each["value"] for each in ray["autoscalerOptions"]["env"]}
    assert int(env["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"]) == POD_START_S >= 2 * 600


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_go_to_their_pool_and_nothing_else_does(cloud: str) -> None:
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


def test_a_taint_of_the_description_is_tolerated() -> None:
    taint = {"key": "team", "value": "a", "effect": "NoExecute"}
    document = rayservice(changed("aws", pool={"taints": [taint]}), KNOWN, read_config(CONFIG))
    assert {"operator": "Equal", **taint} in worker(document)["spec"]["tolerations"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_pods_may_nothing_on_their_node(cloud: str) -> None:
    store = beside(cloud, "StatefulSet")["serve-app-redis"]["spec"]["template"]
    for template in (*pods(service(cloud)), store):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"]
    (space,) = beside(cloud, "Namespace").values()
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_prometheus_finds_the_ports_that_its_monitors_name(cloud: str) -> None:
    service_monitor, ray_monitor = kept("monitoring/podmonitor.yaml")
    head, *workers = (template["spec"]["containers"][0] for template in pods(service(cloud)))
    assert {each["port"] for each in service_monitor["spec"]["podMetricsEndpoints"]} <= set(names(head))
    assert {each["port"] for each in ray_monitor["spec"]["podMetricsEndpoints"]} <= set(names(head))
    assert all("metrics" in names(each) for each in workers)
    wanted = {names(head)[name] for name in ("serve", "metrics", "as-metrics", "dash-metrics")}
    rules = beside(cloud, "NetworkPolicy")["serve-app"]["spec"]["ingress"]
    (ours,) = (rule for rule in rules if "monitoring" in str(rule["from"]))
    assert {port["port"] for port in ours["ports"]} == wanted


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nobody_reaches_ray_but_ray_its_operator_and_prometheus(cloud: str) -> None:
    policies = beside(cloud, "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for rule in policies["serve-app"]["spec"]["ingress"]:
        assert rule["from"], "an empty list is everybody"
        assert all("ipBlock" not in peer for peer in rule["from"])
        open_ports = {port["port"] for port in rule.get("ports", [])}
        if "serve-app/caller" in str(rule["from"]):
            assert open_ports == {8000}
    assert len(policies["serve-app-redis"]["spec"]["ingress"]) == 1
    assert "egress" not in policies["serve-app-redis"]["spec"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_out_it_goes_by_https_and_never_to_a_nodes_metadata(cloud: str) -> None:
    (policy,) = (each for each in network_policies(description(cloud)) if each["metadata"]["name"] == "serve-app")
    blocks = [
        (peer["ipBlock"], [port["port"] for port in rule["ports"]])
        for rule in policy["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    (world, ports), *rest = blocks
    assert ports == [443]
    assert world["except"] == ["169.254.0.0/16"]
    assert [block["cidr"] for block, _ in rest] == {
        "aws": ["169.254.170.23/32"],
        "gcp": ["169.254.169.254/32"],
        "azure": [],
    }[cloud]


@pytest.mark.parametrize(
    ("cloud", "annotations"),
    [
        ("aws", {}),
        ("gcp", {"iam.gke.io/gcp-service-account": "who"}),
        ("azure", {"azure.workload.identity/client-id": "who"}),
    ],
)
def test_workers_are_told_who_they_are_to_the_cloud(cloud: str, annotations: dict[str, str]) -> None:
    account = service_account(description(cloud), "who")
    assert account["metadata"].get("annotations", {}) == annotations
    as_kubernetes(account)
    labelled = "azure.workload.identity/use" in worker(service(cloud))["metadata"]["labels"]
    assert labelled == (cloud == "azure")


def test_what_the_description_leaves_out_is_left_out() -> None:
    addons = {"network_policy": False, "disruption_budget": False, "prometheus": False, "dcgm_exporter": False}
    spec = changed("aws", addons=addons)
    files = render.manifests(spec, KNOWN, CONFIG)
    kinds = {each["kind"] for each in yaml.safe_load_all(files["beside.yaml"])}
    assert kinds == {"Namespace", "ServiceAccount", "Service", "StatefulSet", "StorageClass"}
    assert [chart.release for chart in charts(spec)] == [
        "cluster-autoscaler",
        "nvidia-device-plugin",
        "kuberay-operator",
    ]
    assert "serviceMonitor" not in str(charts(spec)[-1].values)


def test_a_description_of_ones_own_is_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = KEPT / "descriptions/gcp.yaml"
    monkeypatch.chdir(ROOT)  # the description names the service's config relative to where one is
    assert main(["render", "--spec", str(source), "--output", str(tmp_path)]) == 0
    told = {line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()}
    assert told == {str(path) for path in tmp_path.rglob("*") if path.is_file()}
    same = (KEPT / "kubernetes/gcp/rayservice.yaml").read_text()
    assert (tmp_path / "kubernetes/rayservice.yaml").read_text() == same


def test_every_fault_of_a_description_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "wrong.yaml"
    source.write_text("provider: aws\nregion: mars\ngpu_pools: [{instance_types: [g5.xlarge], min: 5}]\n")
    assert main(["render", "--spec", str(source), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "region: 'mars' is no region of aws" in said
    assert "gpu_pools.0.max: 4 is below min 5" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG.read_text())
    source = tmp_path / "cluster.yaml"
    source.write_text((KEPT / "descriptions/aws.yaml").read_text() + f"serve: {{config: {config}}}\n")
    assert main(["render", "--spec", str(source), "--output", str(tmp_path / "out")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_values_file_says_how_it_is_installed(cloud: str) -> None:
    for path in sorted((KEPT / f"kubernetes/{cloud}/values").iterdir()):
        _, command, *_ = path.read_text().splitlines()
        assert re.fullmatch(
            r"# helm upgrade --install (\S+) \S+ --repo https://\S+ --version \d+\.\d+\.\d+ --namespace \S+ "
            rf"--create-namespace --values values/{re.escape(path.name)}",
            command,
        )


def test_the_kinds_of_monitors_are_installed_before_their_monitors() -> None:
    releases = [chart.release for chart in charts(description("aws"))]
    assert releases[0] == "prometheus"
    labels = {
        each["metadata"]["labels"]["release"]
        for each in (*kept("monitoring/podmonitor.yaml"), yaml.safe_load(write.files()["prometheusrule.yaml"]))
    }
    assert labels == {"prometheus"}, "kube-prometheus-stack looks for its release's name"


def test_jobs_are_called_as_the_rules_know_them() -> None:
    """And only one Watchdog is heard: the chart's would go on if our rules were gone."""
    values = yaml.safe_load((KEPT / "kubernetes/aws/values/1-prometheus.yaml").read_text())
    wanted = set(re.findall(r'up\{job="(\w+)"\}', write.files()["prometheusrule.yaml"]))
    ours = {
        rule["replacement"]
        for part in ("alertmanager", "prometheus")
        for rule in values[part]["serviceMonitor"]["relabelings"]
    }
    monitors = {
        rule["replacement"]
        for document in kept("monitoring/podmonitor.yaml")
        for endpoint in document["spec"]["podMetricsEndpoints"]
        for rule in endpoint["relabelings"]
        if rule.get("targetLabel") == "job"
    }
    assert wanted <= ours | monitors
    assert values["defaultRules"]["rules"]["general"] is False
    assert values["prometheus"]["prometheusSpec"]["retention"] == "35d"


def test_on_gke_the_cloud_brings_the_device_plugin_and_the_autoscaler() -> None:
    assert [chart.release for chart in charts(description("gcp"))] == [
        "prometheus",
        "dcgm-exporter",
        "kuberay-operator",
    ]


@pytest.mark.parametrize(
    ("memory_gib", "least", "most"),
    [(16, 11, 12), (32, 26, 28), (64, 55, 59), (768, 700, 740)],
)
def test_a_pod_leaves_the_node_what_it_needs(memory_gib: float, least: float, most: float) -> None:
    """A hand sum for 16 GiB: 15.36 seen; 1 + 0.8 + 0.736 kept, 0.1 for eviction, 1 for daemons: 11.724."""
    assert least < sizes.allocatable_gib(memory_gib) < most
    assert sizes.allocatable_gib(16) == pytest.approx(11.724)


def test_a_pool_with_alternatives_is_as_small_as_the_smallest() -> None:
    spec = changed("aws", pool={"instance_types": ["g5.4xlarge", "g5.xlarge"]})
    assert sizes.pod_size(spec, KNOWN, 0) == sizes.PodSize(cpus=3, cpu_limit=4, memory_gib=11, gpus=1)


def test_a_machine_without_a_place_in_the_catalogue_is_refused_before_anything_is_written() -> None:
    with pytest.raises(SpecError, match=r"gpu_pools\.0\.instance_types\.0"):
        render.manifests(changed("aws", pool={"instance_types": ["g5.9xlarge"]}), KNOWN, CONFIG)
    assert catalogue.load().of("aws", "g5.9xlarge") is None


def test_an_image_by_digest_stays_one() -> None:
    image = "registry.host:5000/a/serve-app@sha256:" + "0" * 64
    spec = changed("aws", serve={"image": image})
    files = render.manifests(spec, KNOWN, CONFIG)
    (image_of,) = yaml.safe_load(files["kustomization.yaml"])["images"]
    assert image_of == {
        "name": "registry.host:5000/a/serve-app",
        "newName": "registry.host:5000/a/serve-app",
        "digest": "sha256:" + "0" * 64,
    }
    assert image in files["rayservice.yaml"]


def test_the_crd_is_the_one_of_the_operator_that_is_installed() -> None:
    (operator,) = (chart for chart in charts(description("aws")) if chart.release == "kuberay-operator")
    assert KUBERAY["kuberay"] == operator.version
    assert operator.values["image"]["tag"] == f"v{operator.version}"
    assert (ROOT / "tests/cluster/reduce_crd.py").exists()


def test_everything_is_in_the_namespace_whose_pods_have_the_clouds_identity() -> None:
    files = render.manifests(changed("aws", name="other"), KNOWN, CONFIG)
    documents = [each for name in ("beside.yaml", "rayservice.yaml") for each in yaml.safe_load_all(files[name])]
    documents = [each for each in documents if each["kind"] != "StorageClass"]  # which has none
    places = {each["metadata"].get("namespace") or each["metadata"]["name"] for each in documents}
    assert places == {"other"}
    (account,) = (each["metadata"]["name"] for each in documents if each["kind"] == "ServiceAccount")
    assert worker(documents[-1])["spec"]["serviceAccountName"] == account == "serve-app"


def test_rendering_needs_no_sdk_of_a_cloud_and_no_pulumi() -> None:
    program = "import sys, infra_pulumi.render; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {name.partition("_")[0] for name in done.stdout.split() if name.startswith("pulumi")} == set()
