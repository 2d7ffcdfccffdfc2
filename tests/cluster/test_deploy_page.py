"""docs/deploy.md: its names, commands and numbers are those of the code and of the rendered files."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from infra_pulumi import options
from infra_pulumi.charts import ALERTMANAGER_CONFIG_SECRET, ALERTMANAGER_CREDENTIALS_SECRET, charts
from infra_pulumi.objects import CALLER_LABEL, IDENTITY_ANNOTATION, MONITORING_NAMESPACE, OPERATOR_NAMESPACE
from infra_pulumi.rayservice import IDLE_S, NAME, OPTIONAL_SECRETS, REDIS, TOKEN_SECRET, environment
from tests.cluster.helpers import ROOT, description, documents, rendered, service

PAGE = (ROOT / "docs/deploy.md").read_text()
TEXT = " ".join(PAGE.split())
CODE = [*re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL), *re.findall(r"`([^`\n]+)`", PAGE)]
COMMANDS = "\n".join(CODE)
MODULES = sorted(set(re.findall(r"python -m ([\w.]+)", COMMANDS)))
COMPONENT = "app.kubernetes.io/component"
PROMETHEUS = "kubernetes/values/1-prometheus.yaml"


def sections() -> list[str]:
    return re.split(r"\n(?=#{2,4} )", PAGE)


@pytest.mark.parametrize("module", MODULES)
def test_python_modules_exist(module: str) -> None:
    found = importlib.util.find_spec(module)
    assert found is not None
    if found.submodule_search_locations:
        assert importlib.util.find_spec(f"{module}.__main__") is not None
    else:
        assert found.origin is not None
        assert '__name__ == "__main__"' in Path(found.origin).read_text()


def test_files_of_the_repository_exist() -> None:
    paths = set(re.findall(r"(?<![\w/.])((?:cluster|docs|infra_pulumi)/[\w./-]+\w)", COMMANDS))
    assert "cluster/descriptions/aws.yaml" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_section_with_a_rendered_file_names_the_render_command() -> None:
    written = rendered("aws")
    paths = set(re.findall(r"rendered/([\w./-]+\w)", COMMANDS))
    assert {"kubernetes/namespace.yaml", "ray-up/aws.yaml", "ray-up/on-premises.yaml"} <= paths
    assert [path for path in paths if not any(f"{name}/".startswith(f"{path}/") for name in written)] == []
    for section in sections():
        assert "rendered/" not in section or re.search(r"\brender\b", section), section.splitlines()[0]
    mounts = documents("aws", "ray-up/aws.yaml")[0]["file_mounts"]
    assert [path for path in re.findall(r"~/serve_app/\S+?(?=')", COMMANDS) if path not in mounts] == []


def test_the_table_of_contents_has_every_heading() -> None:
    links = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    headings = re.findall(r"^#{2,4} (.+)$", PAGE, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert set(links) <= set(anchors)
    assert set(anchors) - set(links) == {"with-pulumi"}


def test_the_variables_of_ray_serve_are_those_of_the_manifests() -> None:
    table = dict(re.findall(r"^\| `(RAY_\w+)(?:=(\S+))?` \|", PAGE, re.MULTILINE))
    variables = {each["name"]: each["value"] for each in environment(600) if "value" in each}
    assert table.items() <= {**variables, **{name: "" for name in variables if "HAPROXY_" in name}}.items()
    assert set(variables) - set(table) == {
        "HF_HUB_DISABLE_TELEMETRY",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED",
        "RAY_USAGE_STATS_ENABLED",
    }


def test_the_table_of_commands_has_every_command() -> None:
    (table,) = re.findall(r"\| command \| result \|\n(.*?)\n\n", PAGE, re.DOTALL)
    rows = [row.split(" | ")[0] for row in table.splitlines()[1:]]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    (commands,) = (each.choices for each in options.parser()._actions if each.dest == "command")
    assert listed == set(commands or ())


def test_secrets_are_those_of_the_manifests() -> None:
    text = yaml.safe_dump(service("aws"))
    created = dict(re.findall(r"create secret generic (\S+) --from-literal=(\w[\w-]*)=", COMMANDS))
    expected = {TOKEN_SECRET: "auth_token", REDIS: "password", **dict(OPTIONAL_SECRETS.values())}
    assert {name: created.pop(name) for name in expected} == expected
    assert all(name in text for name in expected)
    (values,) = documents("aws", PROMETHEUS)
    assert set(created) == {values["grafana"]["admin"]["existingSecret"]}


def test_a_documentation_page_creates_the_secrets_that_alertmanager_reads() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "cluster/monitoring/README.md"]
    text = "\n".join(page.read_text() for page in pages)
    (values,) = documents("aws", PROMETHEUS)
    secrets = [ALERTMANAGER_CREDENTIALS_SECRET, ALERTMANAGER_CONFIG_SECRET]
    assert values["alertmanager"]["alertmanagerSpec"] == {
        "useExistingSecret": True,
        "configSecret": ALERTMANAGER_CONFIG_SECRET,
        "secrets": secrets,
    }
    assert set(re.findall(r"create secret generic (\S+) --from-file", text)) == set(secrets)
    assert f"/etc/alertmanager/secrets/{ALERTMANAGER_CREDENTIALS_SECRET}/" in text


def test_namespaces_releases_and_services_are_those_of_the_files() -> None:
    releases = {chart.release for chart in charts(description("aws"))}
    assert set(re.findall(r"kubectl -n (\S+)", COMMANDS)) == {
        service("aws")["metadata"]["namespace"],
        MONITORING_NAMESPACE,
    }
    helm = re.findall(r"helm -n (\S+) (?:rollback|uninstall) ([^\n`#]+)", COMMANDS)
    assert {namespace for namespace, _ in helm} == {OPERATOR_NAMESPACE, MONITORING_NAMESPACE}
    assert {release for _, names in helm for release in names.split()} <= releases
    assert f"svc/{NAME}-serve-svc" in COMMANDS
    assert f"svc/{NAME}-head-svc" in COMMANDS
    (label,) = CALLER_LABEL.items()
    assert "=".join(label) in COMMANDS
    assert all(f"{key}=" in COMMANDS for key in IDENTITY_ANNOTATION.values())


def test_objects_in_commands_are_rendered() -> None:
    files = ("kubernetes/namespace.yaml", "kubernetes/prepull.yaml", "kubernetes/rayservice.yaml")
    objects = [each for name in files for each in documents("aws", name)]
    created = {(each["kind"].lower(), each["metadata"]["name"]) for each in objects}
    used = re.findall(r"(?:get|patch|annotate) (rayservice|namespace|serviceaccount) ([a-z][\w-]+)", COMMANDS)
    assert set(used) <= created
    assert ("poddisruptionbudget", "serve-app-head") in created
    assert "get pdb serve-app-head" in COMMANDS
    assert ("daemonset", "serve-app-prepull-gpu") in created
    assert "rollout status daemonset serve-app-prepull-gpu" in TEXT
    assert "kubectl apply -l app.kubernetes.io/component=prepull" in TEXT
    assert [each["kind"] for each in objects if each["metadata"]["labels"][COMPONENT] == "prepull"] == ["DaemonSet"]
    policies = sorted(name for kind, name in created if kind == "networkpolicy")
    assert ", ".join(f"`{name}`" for name in policies) in PAGE


def test_json_paths_and_patches_are_valid() -> None:
    for path in re.findall(r"get rayservice serve-app -o jsonpath='\{\.([\w.]+)\}'", COMMANDS):
        value = service("aws")
        for key in path.split("."):
            value = value[key]
    for patch in re.findall(r"(?:-p|--overrides)=?\s?'(\{.*?\})'", COMMANDS):
        json.loads(patch)


def test_delays_are_those_of_the_files() -> None:
    minutes = service("aws")["spec"]["rayClusterDeletionDelaySeconds"] // 60
    assert f"deletes the first one {minutes} minutes later" in TEXT
    assert f"a GPU node is removed after {IDLE_S // 60} minutes" in TEXT


def test_every_row_of_the_checklist_has_a_command_and_an_expected_result() -> None:
    (table,) = re.findall(r"## Before production\n\n(.*)", PAGE, re.DOTALL)
    rows = [re.split(r" \| ", row.strip("| \n")) for row in table.splitlines()[2:] if row]
    assert len(rows) >= 15
    for row in rows:
        assert len(row) == 3, row
        assert re.search(r"`(kubectl|curl|\.venv/bin/python) ", row[1]), row


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python -m infra_pulumi (\w[^`\n#>]*)", COMMANDS))))
def test_command_lines_are_valid(line: str) -> None:
    assert options.parser().parse_args(line.split()).command == line.split()[0]
