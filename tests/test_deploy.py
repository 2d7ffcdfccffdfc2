"""`python -m serve_app deploy` as far as it runs without a cluster: what it sends, waits for and reports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import cli, deploy
from serve_app.progress import Progress
from tests.configs import serve_document

Json = dict[str, Any]

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
\x1b[36mray::ServeReplica:serve_app:model-toy.initialize()\x1b[39m (pid=1)
  File "replica.py", line 77, in __init__
ValueError: no weights
"""


class ScriptedApi(deploy.ServeApi):
    """Answers with the states of `after` after the first deployment, and notes what is deployed."""

    def __init__(self, before: Json, *after: Json | Exception) -> None:
        self._states: Iterator[Json | Exception] = iter((before, *after))
        self.sent: list[Json] = []

    def applications(self) -> Json:
        state = next(self._states)
        if isinstance(state, Exception):
            raise state
        return state

    def deploy(self, document: Json) -> None:
        self.sent.append(document)


def state(status: str, message: str = "", deployments: Json | None = None, **fields: Any) -> Json:
    return {"llm": {"status": status, "message": message, "deployments": deployments or {}, **fields}}


def deployment(status: str, message: str = "") -> Json:
    return {"status": status, "message": message}


DOCUMENT: Json = {"http_options": {"port": 1}, "applications": [{"name": "llm", "args": "new"}]}
OLD: Json = {"name": "llm", "args": "old"}
SERVES = state("RUNNING", deployed_app_config=OLD)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "_POLL_INTERVAL_S", 0)


def run(api: ScriptedApi, timeout_s: float = 60) -> None:
    deploy._deploy_or_restore(api, DOCUMENT, timeout_s, Progress())


def test_it_waits_until_the_new_configuration_runs(capsys: pytest.CaptureFixture[str]) -> None:
    updating = {"model-a": deployment("UPDATING"), "Ingress": deployment("HEALTHY")}
    api = ScriptedApi(SERVES, state("DEPLOYING"), ConnectionError("starts"), state("DEPLOYING", "", updating), SERVES)
    run(api)
    assert api.sent == [DOCUMENT]
    shown = [line.partition(" s] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["llm: deploying", "llm: unknown", "llm: model-a updating"]


def test_a_failed_configuration_is_replaced_by_the_previous_one_of_every_application() -> None:
    failed = {"model-a": deployment("DEPLOY_FAILED", TRACEBACK), "Ingress": deployment("HEALTHY", "fine")}
    other = {"status": "RUNNING", "message": "", "deployments": {}, "deployed_app_config": {"name": "other"}}
    api = ScriptedApi({**SERVES, "other": other}, state("DEPLOY_FAILED", "One failed.", failed), SERVES)
    with pytest.raises(deploy.DeployError) as error:
        run(api)
    assert api.sent == [DOCUMENT, {**DOCUMENT, "applications": [OLD, {"name": "other"}]}]
    assert str(error.value).splitlines() == [
        "llm cannot run:",
        "  One failed.",
        "  The deployment failed to start 3 times in a row. Error:",
        "  ValueError: no weights",
        "The previous configuration was restored.",
    ]


@pytest.mark.parametrize("before", [{}, state("DEPLOY_FAILED", deployed_app_config=OLD), state("RUNNING")])
def test_without_a_configuration_that_served_nothing_is_restored(before: Json) -> None:
    api = ScriptedApi(before, state("DEPLOY_FAILED", "Bad."))
    with pytest.raises(deploy.DeployError, match="There is no previous configuration that served"):
        run(api)
    assert api.sent == [DOCUMENT]


def test_an_application_that_recovers_is_waited_for() -> None:
    """Its replica was lost just before, for example."""
    unhealthy = state("UNHEALTHY", "A replica is lost.", deployed_app_config=OLD)
    api = ScriptedApi(unhealthy, unhealthy, SERVES)
    run(api)
    assert api.sent == [DOCUMENT]


def test_an_application_that_stays_unhealthy_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "_UNHEALTHY_S", -1.0)
    api = ScriptedApi(SERVES, state("UNHEALTHY", "A replica fails again and again."), SERVES)
    with pytest.raises(deploy.DeployError, match=r"fails again and again\.\nThe previous configuration was restored"):
        run(api)


def test_a_rollout_that_takes_too_long_is_taken_back() -> None:
    states = itertools.chain([state("DEPLOYING", "Waits for a GPU.")], itertools.repeat(SERVES))
    api = ScriptedApi(SERVES)
    api._states = itertools.chain([SERVES], states)
    with pytest.raises(deploy.DeployError) as error:
        run(api, timeout_s=-1)
    assert str(error.value).startswith("llm does not run after -1 s:\n  Waits for a GPU.\n")
    assert len(api.sent) == 2


def test_an_invalid_file_and_a_missing_cluster_end_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    document = serve_document()
    document["applications"][0]["args"]["sauce"] = 1
    file.write_text(yaml.safe_dump(document))
    assert cli.main(["deploy", "--config", str(file)]) == 1
    assert capsys.readouterr().err == f"serve_app: {file}:\n  applications.0.args.sauce: unknown key\n"


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(yaml.safe_dump(serve_document()))
    assert cli.main(["deploy", "--config", str(file), "--address", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("serve_app: no Ray dashboard answers at http://127.0.0.1:9: ")
