"""Settings to files: what is refused and how it is said, and that no secret is ever in what is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from alerts import render, slo
from alerts.__main__ import main
from alerts.settings import DEAD_MAN_SILENCE_S, EXAMPLE, Settings, SettingsError, load, seconds
from tests.alerts.world import Json, ready, secrets, written


def rendered(folder: Path, **changes: Any) -> Json:
    document: Json = yaml.safe_load(render.config(load(written(folder, ready(**changes)))))
    return document


def run(folder: Path, *more: str) -> int:
    return main(["render", "--settings", str(folder / "settings.yml"), "--output", str(folder / "out"), *more])


def test_the_example_is_rendered_and_says_what_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(EXAMPLE, tmp_path / "settings.yml")
    assert run(tmp_path) == 0
    said = capsys.readouterr()
    assert f"wrote {tmp_path}/out/alertmanager.yml" in said.out
    assert f"--config.file={tmp_path}/out/alertmanager.yml" in said.out
    assert "not ready for production" in said.err
    assert "email.recipients.0: 'team@example.com'" in said.err
    assert f"pagerduty.routing_key_file: {tmp_path}/secrets/pagerduty_routing_key: No such file" in said.err


def test_the_examples_comments_are_the_defaults() -> None:
    text = EXAMPLE.read_text()
    optional = text[text.index("# group_by:") :]
    shown = yaml.safe_load("\n".join(line.removeprefix("# ") for line in optional.splitlines()))
    settings = load(EXAMPLE).model_dump(mode="json")
    assert shown == {key: settings[key] for key in ("group_by", "inhibition", "timing")}


def test_the_dead_mans_patience_is_the_same_wherever_it_is_said() -> None:
    for path in (EXAMPLE, render.HERE.parent / "README.md"):
        assert f"after {DEAD_MAN_SILENCE_S} s of silence" in " ".join(path.read_text().replace("#", "").split())


def test_production_refuses_the_example_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(EXAMPLE, tmp_path / "settings.yml")
    secrets(tmp_path / "secrets")
    assert run(tmp_path, "--production") == 2
    said = capsys.readouterr().err
    for key in (
        "runbooks_url",
        "dashboards_url",
        "email.smarthost",
        "email.sender",
        "email.recipients.0",
        "email.digest_recipients.0",
        "dead_man.url",
    ):
        assert f"{key}: '" in said
    assert "secrets/" not in said, "they are there"
    assert not (tmp_path / "out").exists()


def test_production_takes_what_is_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, ready())
    secrets(tmp_path / "secrets")
    assert run(tmp_path, "--production") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "/-/reload" in said.out
    assert f"rule_files: [{tmp_path}/out/rules/*.yml]" in said.out
    rules = [path.name for path in (render.HERE / "rules").glob("*.yml")]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == sorted(
        ["alertmanager.yml", "serve_app.tmpl", *rules]
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("pagerduty_routing_key", None, "No such file"),
        ("pagerduty_routing_key", "", "one line"),
        ("pagerduty_routing_key", "\n \n", "one line"),
        ("pagerduty_routing_key", "one\ntwo\n", "one line"),
        ("pagerduty_routing_key", "your-pagerduty-key", "example"),
        ("slack_critical_url", "https://hooks.slack.com/services/YOUR/WEBHOOK/URL", "example"),
        ("slack_warning_url", "T0/B0/xyz", "the whole URL"),
        ("smtp_password", "your-smtp-password", "example"),
        ("smtp_password", "good\n", "ends in a new line"),
        ("dead_man_token", "changeme", "example"),
        ("history_token", "<token>", "example"),
    ],
)
def test_production_refuses_secrets_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, said: str
) -> None:
    written(tmp_path, ready())
    path = secrets(tmp_path / "secrets") / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert run(tmp_path, "--production") == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert said in error
    assert not text or not text.strip() or text.strip() not in error, "a secret is not said aloud"


def test_secrets_that_everybody_can_read_and_unencrypted_ways_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = ready()
    document["dead_man"]["url"] = "http://deadman.llm.test/ping"
    written(tmp_path, document)
    path = secrets(tmp_path / "secrets") / "history_token"
    path.chmod(0o644)
    assert run(tmp_path, "--production") == 0
    said = capsys.readouterr().err
    assert f"history.token_file: {path} can be read by every user" in said
    assert f"chmod 600 {path}" in said
    assert "dead_man.url: sends its secret unencrypted" in said
    assert said.count("\n") == 3


def test_no_secret_is_written(tmp_path: Path) -> None:
    names = {name: f"very-secret-{name}" for name in ("pagerduty_routing_key", "smtp_password", "dead_man_token")}
    secrets(tmp_path / "secrets", **names, slack_critical_url="https://hooks.slack.com/very-secret")
    for path in render.write(load(written(tmp_path, ready())), tmp_path / "out"):
        assert "very-secret" not in path.read_text()


def test_every_secret_comes_from_a_file_that_alertmanager_0_25_can_read(tmp_path: Path) -> None:
    text = render.config(load(written(tmp_path, ready())))
    assert set(re.findall(r"(\w+_file): ", text)) == {
        "api_url_file",
        "credentials_file",
        "routing_key_file",
        "smtp_auth_password_file",
    }
    files = re.findall(r'\w+_file: "([^"]+)"', text)
    assert all(Path(file).parent == tmp_path / "secrets" for file in files)


def test_without_a_login_mail_is_sent_without(tmp_path: Path) -> None:
    document = ready()
    del document["email"]["username"], document["email"]["password_file"]
    settings = load(written(tmp_path, document))
    assert "smtp_auth" not in render.config(settings)
    assert "email.password_file" not in settings.secret_files()


def test_without_a_history_nothing_is_sent_to_one(tmp_path: Path) -> None:
    document = ready()
    del document["history"]
    settings = load(written(tmp_path, document))
    found = yaml.safe_load(render.config(settings))
    assert "history" not in {each["name"] for each in found["receivers"]}
    assert "history" not in {each["receiver"] for each in found["route"]["routes"]}
    assert found["route"]["routes"][2]["receiver"] == "critical"
    assert "history.token_file" not in settings.secret_files()
    assert not any("history" in line for line in render.dangers(settings))


def test_what_is_set_arrives(tmp_path: Path) -> None:
    wait = {"group_wait": "1s", "group_interval": "2s", "repeat_interval": "1h30m"}
    found = rendered(
        tmp_path,
        timing={"critical": wait, "dead_man": "7s"},
        group_by=["alertname", "pool"],
        business_hours={"location": "Europe/Berlin", "days": ["monday:thursday", "saturday"], "start": "08:30"},
        inhibition={"place": ["pool"], "service_down": ["Gone", "Lost"], "spared": ["disk", "the-network"]},
    )
    dead_man, _, history, critical, *_ = found["route"]["routes"]
    assert {key: critical[key] for key in wait} == wait
    assert dead_man["group_interval"] == "7s"
    assert history["continue"] is True
    assert found["route"]["group_by"] == ["alertname", "pool"]
    (hours,) = found["time_intervals"][0]["time_intervals"]
    assert hours == {
        "location": "Europe/Berlin",
        "weekdays": ["monday:thursday", "saturday"],
        "times": [{"start_time": "08:30", "end_time": "17:00"}],
    }
    *_, down = found["inhibit_rules"]
    assert down["source_matchers"] == ['alertname=~"Gone|Lost"']
    assert down["target_matchers"] == ['alertname!~"Gone|Lost"', 'severity!="none"', 'symptom!~"|disk|the-network"']
    assert found["inhibit_rules"][0]["equal"] == ["alertname", "pool"]


def test_the_rules_links_lead_where_the_settings_say(tmp_path: Path) -> None:
    written(tmp_path, ready(runbooks_url="https://llm.test/books/"))
    secrets(tmp_path / "secrets")
    assert run(tmp_path, "--production") == 0
    for path in (render.HERE / "rules").glob("*.yml"):
        kept, rendered_ = path.read_text(), (tmp_path / "out/rules" / path.name).read_text()
        assert rendered_.count("runbook_url: https://llm.test/books/") == kept.count("runbook_url: ") > 0
        assert rendered_.count("dashboard_url: https://llm.test/d/serve-app-") == kept.count("dashboard_url: ")
        assert "example.com" not in rendered_
        back = rendered_.replace("https://llm.test/books", slo.RUNBOOKS).replace("https://llm.test/d/", "DASHBOARDS/")
        assert back == kept.replace(f"{slo.DASHBOARDS}/", "DASHBOARDS/"), "nothing else is changed"


def test_odd_texts_stay_texts(tmp_path: Path) -> None:
    document = ready()
    document["slack"]["critical"]["channel"] = "#a\"b'c:{d}"
    document["email"]["username"] = "über: 'x' # y"
    found = rendered(tmp_path, **document)
    (critical,) = (one for one in found["receivers"] if one["name"] == "critical")
    assert critical["slack_configs"][0]["channel"] == "#a\"b'c:{d}"
    assert found["global"]["smtp_auth_username"] == "über: 'x' # y"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pagerdty": {}}, "pagerdty: no such key; there are external_url, runbooks_url, dashboards_url"),
        (
            {"slack": {"critical": {"chanel": "#a"}}},
            "slack.critical.chanel: no such key; there are channel, api_url_file",
        ),
        (
            {"timing": {"night": "1s"}},
            "timing.night: no such key; there are critical, warning, digest, history, dead_man",
        ),
        ({"timing": {"dead_man": "30"}}, "timing.dead_man: '30' is no duration above zero; write it like 30s"),
        ({"timing": {"dead_man": "0s"}}, "timing.dead_man: '0s' is no duration above zero"),
        (
            {"timing": {"digest": {"group_wait": "1s", "group_interval": "1h", "repeat_interval": "1m"}}},
            "timing.digest: repeat_interval 1m is below group_interval 1h",
        ),
        (
            {"timing": {"history": {"group_wait": "1s", "group_interval": "1m", "repeat_interval": "2h"}}},
            "timing: history.repeat_interval 2h is above 1h",
        ),
        ({"runbooks_url": "https://git.test/a b"}, "runbooks_url: 'https://git.test/a b' is no address that a path"),
        ({"runbooks_url": "https://git.test/a?b={{ 1 }}"}, "is no address that a path can be put behind"),
        ({"dashboards_url": "grafana.test/d"}, "dashboards_url: 'grafana.test/d' is no URL; write it like"),
        ({"dead_man": {"url": "deadman.llm.test", "token_file": "t"}}, "dead_man.url: 'deadman.llm.test' is no URL"),
        ({"history": {"url": "http://127.0.0.1/"}}, "history.token_file: missing; settings.example.yml shows it"),
        ({"business_hours": {"location": "Mars/Base"}}, "business_hours.location: 'Mars/Base' is no time zone"),
        ({"business_hours": {"location": "../../etc/passwd"}}, "is no time zone"),
        ({"business_hours": {"location": "UTC", "days": ["mon-fri"]}}, "business_hours.days.0: 'mon-fri' is no day"),
        ({"business_hours": {"location": "UTC", "days": []}}, "business_hours.days: "),
        ({"business_hours": {"location": "UTC", "start": "9"}}, "business_hours.start: '9' is no time of day"),
        (
            {"business_hours": {"location": "UTC", "start": "22:00", "end": "06:00"}},
            "start 22:00 is not before end 06:00",
        ),
        ({"business_hours": {"location": "UTC", "end": 1020}}, "business_hours.end: 1020 is no text; put it in quotes"),
        ({"group_by": ["a-b"]}, "group_by.0: 'a-b' is no name of a label"),
        ({"inhibition": {"service_down": ['x"}']}}, "inhibition.service_down.0: "),
        ({"inhibition": {"spared": [".*"]}}, "inhibition.spared.0: '.*' is no symptom"),
    ],
)
def test_a_fault_is_told_with_its_key_and_what_would_work(tmp_path: Path, changes: Json, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(written(tmp_path, ready(**changes)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("smarthost", "smtp.llm.test", "has no port"),
        ("sender", "nobody", "is no mail address"),
        ("recipients", [], "email.recipients: "),
        ("recipients", ["a@b.test, c@d.test"], "several as a list"),
        ("username", None, "username and password_file go together"),
    ],
)
def test_faults_of_mail(tmp_path: Path, key: str, value: object, said: str) -> None:
    document = ready()
    document["email"][key] = value
    with pytest.raises(SettingsError, match=re.escape(said)):
        load(written(tmp_path, document))


def test_a_url_with_a_password_is_refused_without_repeating_it(tmp_path: Path) -> None:
    document = ready(history={"url": "http://me:hunter2@127.0.0.1/", "token_file": "t"})
    with pytest.raises(SettingsError, match="holds no user or password") as caught:
        load(written(tmp_path, document))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\t"])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yml").write_text(text)
    assert run(tmp_path) == 2
    assert "settings.yml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_says_where_to_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 2
    assert f"begin with a copy of {EXAMPLE}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, ready())
    (tmp_path / "out").write_text("a file")
    assert run(tmp_path) == 2
    assert "give another --output" in capsys.readouterr().err


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(EXAMPLE).external_url = "http://else"  # type: ignore[misc]
    assert Settings.model_config["extra"] == "forbid"


def test_durations() -> None:
    assert [seconds(text) for text in ("200ms", "30s", "5m", "1h30m", "1d")] == [0.2, 30, 300, 5400, 86400]


def test_check_without_files_or_amtool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--output", str(tmp_path)]) == 2
    assert "python -m alerts render" in capsys.readouterr().err
    render.write(load(EXAMPLE), tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main(["check", "--output", str(tmp_path)]) == 3
    assert render.INSTALL in capsys.readouterr().err


@pytest.mark.system
def test_check_finds_what_amtool_finds(tmp_path: Path) -> None:
    path = render.write(load(EXAMPLE), tmp_path)[0]
    assert main(["check", "--output", str(tmp_path)]) == 0
    path.write_text(path.read_text().replace("receiver: digest", "receiver: no-such"))
    assert main(["check", "--output", str(tmp_path)]) == 1


@pytest.mark.parametrize("command", [[], ["render"], ["check"], ["history"]])
def test_help_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m alerts {' '.join(command)}")
    assert "python -m alerts render" in said if not command else "Exit code" in said
