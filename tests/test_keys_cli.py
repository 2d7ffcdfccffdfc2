"""The commands `keys` and `tenants`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import main
from tests.configs import app_args

Run = Callable[[str], str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder without a config file and returns its output."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(command: str, code: int = 0) -> str:
        assert main(shlex.split(command)) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    return run


def as_json(run: Run, command: str) -> Any:
    return json.loads(run(f"{command} --json"))


def test_the_secret_is_shown_once(run: Run) -> None:
    text = run("keys create --name ci")
    key = text.splitlines()[0]
    assert key.startswith("sk-serve-")
    assert "only time" in text
    for command in ("keys list", "keys list --json", "keys audit", "keys audit --json"):
        assert key.rpartition("-")[2] not in run(command)
    assert key.split("-")[2] in run("keys list")


def test_a_key_has_what_the_options_say(run: Run) -> None:
    run("tenants set acme")
    command = "keys create --tenant acme --name web --scopes inference,metrics --models small,legal --expires 90d"
    made = as_json(run, f"{command} --requests-per-minute 60 --dollars-per-day 1.5 --tokens-per-day none")
    assert made["key"].startswith(f"sk-serve-{made['id']}-")
    (listed,) = as_json(run, "keys list --tenant acme")
    assert {**listed, "key": made["key"]} == made
    assert (listed["scopes"], listed["models"], listed["state"]) == (
        ["inference", "metrics"],
        ["legal", "small"],
        "active",
    )
    assert listed["limits"] == {"requests_per_minute": 60, "dollars_per_day": 1.5}
    assert as_json(run, "keys list --tenant default") == []


def test_rotation_and_revocation(run: Run) -> None:
    old = as_json(run, "keys create")
    new = as_json(run, f"keys rotate {old['id']} --grace 1h")
    assert new["id"] != old["id"]
    listed = {one["id"]: one for one in as_json(run, "keys list")}
    assert listed[old["id"]]["expires"] is not None
    assert listed[new["id"]]["expires"] is None
    assert run(f"keys revoke {old['id']}") == f"Key {old['id']} is revoked.\n"
    assert [one["action"] for one in as_json(run, "keys audit --limit 2")] == ["keys.revoke", "keys.rotate"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("keys revoke ffffffffffff", "key 'ffffffffffff' does not exist"),
        ("keys create --tenant acme", "create it with: python -m serve_app tenants set acme"),
        ("keys list --config nothing.yaml", "no such file"),
        ("keys list --database-url mysql", "--database-url"),
        ("keys list --database-url sqlite:////nothing/keys.db", "the database cannot be used: "),
        ("tenants delete acme", "tenant 'acme' does not exist"),
    ],
)
def test_errors_name_the_fault(run: Any, command: str, message: str) -> None:
    found = run(command, code=1)
    assert found.startswith("serve_app: ")
    assert message in found
    assert "Traceback" not in found


@pytest.mark.parametrize(
    "command",
    [
        "keys create --scopes root",
        "keys create --expires 1y",
        "keys create --expires 0d",
        "keys create --models ,",
        "keys create --requests-per-minute -1",
        "keys create --dollars-per-day 1e5",
        "tenants set 'a b'",
        "tenants set acme --weight 0",
        "tenants set acme --weight nan",
        "keys",
    ],
)
def test_wrong_options_are_refused(run: Any, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    assert ended.value.code == 2
    assert "usage: python -m serve_app" in capsys.readouterr().err


def test_tenants(run: Run) -> None:
    text = run("tenants set acme --weight 2 --tokens-per-minute 500 --dollars-per-month 10.5")
    assert text == "Tenant acme: weight 2, limits: tokens_per_minute 500, dollars_per_month 10.5.\n"
    run("tenants set acme --tokens-per-minute none")
    assert as_json(run, "tenants list") == [{"tenant": "acme", "weight": 2.0, "limits": {"dollars_per_month": 10.5}}]
    run("tenants delete acme")
    assert as_json(run, "tenants list") == []


def test_the_database_is_that_of_the_config_file(run: Run, tmp_path: Path) -> None:
    args = {**app_args(), "database": {"url": f"sqlite:///{tmp_path / 'mine.db'}"}}
    file = {"applications": [{"import_path": "serve_app.app:build", "args": args}]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(file))
    run("keys create --config other.yaml")
    assert (tmp_path / "mine.db").exists()
    assert as_json(run, "keys list") == []
    assert len(as_json(run, f"keys list --database-url sqlite:///{tmp_path / 'mine.db'}")) == 1
