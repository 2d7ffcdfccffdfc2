"""`python -m serve_app usage`: prints the usage as a table, CSV or JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from serve_app import cli
from serve_app.core.usage import Usage
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.usage_store import Place, Sums, UsageStore
from tests.configs import SHIPPED

HOUR = 1_796_040_000  # 2026-11-30T12:00Z
TIME = ("--from", "2026-11-30", "--to", "2026-12-01")


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration file whose database has the usage of two keys."""
    url = f"sqlite:///{tmp_path / 'usage.db'}"
    store = UsageStore(open_database(DatabaseOptions(url=url)))
    one, other = Sums.of(Usage("acme", "k1", "m", 1000, 400, 50, 2, 1_500_000_000)), Sums(7, 1, 0, 1, 0, 5)
    store.add({Place(HOUR, "acme", "k1", "m"): one, Place(HOUR, "b", "k22", "m"): other})
    store.close()
    document = yaml.safe_load(SHIPPED.read_text())
    document["applications"][0]["args"]["database"] = {"url": url}
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_the_table(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["usage", "--config", config, *TIME]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tenant  key  model  requests  prompt_tokens  cached_tokens  output_tokens  reasoning_tokens  cost_dollars",
        "acme    k1   m             1           1000            400             50                 2   1.500000000",
        "b       k22  m             7              1              0              1                 0   0.000000005",
    ]


def test_csv_and_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["usage", "--config", config, *TIME, "--group-by", "day,model", "--tenant", "acme"]
    assert cli.main([*arguments, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "2026-11-30,m,1,1000,400,50,2,1.500000000"
    assert cli.main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["day"], row["cost_dollars"]) == ("2026-11-30", 1.5)


def test_no_usage_is_an_empty_table(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["usage", "--config", config, "--from", "2020-01-01", "--to", "2020-02-01"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("wrong", [("--from", "yesterday"), ("--group-by", "user")])
def test_a_wrong_argument_is_refused(config: str, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["usage", "--config", config, *wrong])
    assert error.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_database_that_cannot_be_opened_is_one_line(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(config).read_text().replace("usage.db", "nowhere/usage.db")
    Path(config).write_text(text)
    assert cli.main(["usage", "--config", config]) == 1
    assert capsys.readouterr().err.startswith("serve_app: the database cannot be used: ")
