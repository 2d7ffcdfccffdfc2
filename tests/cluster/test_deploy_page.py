"""docs/deploy.md: names, commands and figures in it are those of the files that it is about."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from infra_pulumi import options
from infra_pulumi.charts import RECEIVERS, ROUTES
from infra_pulumi.objects import CALLER, IDENTITY_ANNOTATION, MONITORING_NAMESPACE, OPERATOR_NAMESPACE
from infra_pulumi.rayservice import IDLE_S, MODEL_SECRET, NAME, REDIS, TOKEN_SECRET
from infra_pulumi.render import KEPT, ROOT
from tests.cluster.world import kept

PAGE = (ROOT / "docs/deploy.md").read_text()
CODE = [*re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL), *re.findall(r"`([^`\n]+)`", PAGE)]
TYPED = "\n".join(CODE)
MODULES = sorted(set(re.findall(r"python -m ([\w.]+)", TYPED)))
SERVICE = kept("kubernetes/aws/rayservice.yaml")[0]
CHARTS = {path.stem.partition("-")[2]: path for path in (KEPT / "kubernetes/aws/values").iterdir()}


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_it_runs_are_there(module: str) -> None:
    found = importlib.util.find_spec(module)
    assert found is not None
    if found.submodule_search_locations:
        assert importlib.util.find_spec(f"{module}.__main__") is not None
    else:
        assert found.origin is not None
        assert '__name__ == "__main__"' in Path(found.origin).read_text()


def test_files_of_the_repository_are_there() -> None:
    named = set(re.findall(r"(?:(?<![\w/.])|(?<=~/serve_app/))((?:cluster|docs)/[\w./-]+\w)", TYPED))
    assert "cluster/ray-up/aws.serve.yaml" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_secrets_are_those_that_the_service_asks_for() -> None:
    text = yaml.safe_dump(SERVICE)
    made = dict(re.findall(r"create secret generic (\S+) --from-literal=(\w[\w-]*)=", TYPED))
    assert {made.pop(name) for name in (TOKEN_SECRET, REDIS, MODEL_SECRET)} == {"auth_token", "password", "hf_token"}
    assert all(name in text for name in (TOKEN_SECRET, REDIS, MODEL_SECRET))
    values = yaml.safe_load(CHARTS["prometheus"].read_text())
    assert set(made) == {values["grafana"]["admin"]["existingSecret"]}


def test_alertmanager_reads_the_secrets_that_its_page_makes() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    told = yaml.safe_load(CHARTS["prometheus"].read_text())["alertmanager"]["alertmanagerSpec"]
    assert told == {"useExistingSecret": True, "configSecret": ROUTES, "secrets": [RECEIVERS, ROUTES]}
    made = set(re.findall(r"create secret generic (\S+) --from-file", page))
    assert made == {ROUTES, RECEIVERS}
    assert f"/etc/alertmanager/secrets/{RECEIVERS}/" in page
    assert "### Alertmanager on Kubernetes" in page


def test_namespaces_and_releases_are_those_of_the_files() -> None:
    spaces = set(re.findall(r"kubectl -n (\S+)", TYPED))
    assert spaces == {SERVICE["metadata"]["namespace"], MONITORING_NAMESPACE}
    helm = re.findall(r"helm -n (\S+) (?:rollback|uninstall) ([^\n`#]+)", TYPED)
    assert {space for space, _ in helm} == {OPERATOR_NAMESPACE, MONITORING_NAMESPACE}
    assert {release for _, releases in helm for release in releases.split()} <= set(CHARTS)
    assert f"svc/{NAME}-serve-svc" in TYPED
    assert f"svc/{NAME}-head-svc" in TYPED
    (label,) = CALLER.items()
    assert "=".join(label) in TYPED
    assert all(f"{key}=" in TYPED for key in IDENTITY_ANNOTATION.values())


def test_objects_that_a_check_asks_for_are_made() -> None:
    made = {(each["kind"].lower(), each["metadata"]["name"]) for each in (*kept("kubernetes/aws/beside.yaml"), SERVICE)}
    asked = re.findall(r"(?:get|patch|annotate) (rayservice|namespace|serviceaccount) ([a-z][\w-]+)", TYPED)
    assert set(asked) <= made
    assert ("poddisruptionbudget", "serve-app-head") in made
    assert "get pdb serve-app-head" in TYPED
    policies = sorted(name for kind, name in made if kind == "networkpolicy")
    assert ", ".join(f"`{name}`" for name in policies) in PAGE


def test_paths_into_objects_lead_somewhere() -> None:
    for path in re.findall(r"get rayservice serve-app -o jsonpath='\{\.([\w.]+)\}'", TYPED):
        place = SERVICE
        for key in path.split("."):
            place = place[key]
    for patch in re.findall(r"(?:-p|--overrides)=?\s?'(\{.*?\})'", TYPED):
        json.loads(patch)


def test_times_are_those_of_the_files() -> None:
    assert f"the first {SERVICE['spec']['rayClusterDeletionDelaySeconds'] // 60} minutes later" in " ".join(
        PAGE.split()
    )
    assert f"goes {IDLE_S // 60} minutes after its last replica" in PAGE


def test_every_line_of_the_checklist_has_a_command_and_its_answer() -> None:
    (table,) = re.findall(r"## Before production\n\n(.*)", PAGE, re.DOTALL)
    rows = [re.split(r" \| ", row.strip("| \n")) for row in table.splitlines()[2:] if row]
    assert len(rows) >= 15
    for row in rows:
        assert len(row) == 3, row
        assert re.search(r"`(kubectl|curl|\.venv/bin/python) ", row[1]), row


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python -m infra_pulumi (\w[^`\n#>]*)", TYPED))))
def test_commands_of_this_room_are_taken(line: str) -> None:
    asked = options.parser().parse_args(line.split())
    assert asked.command == line.split()[0]
