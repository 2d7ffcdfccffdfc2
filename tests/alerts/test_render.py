"""Rendering of the settings: error messages, written files, and the absence of secrets in them."""

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
from tests.alerts.receivers import Json, production_settings, write_secrets, write_settings


def rendered(folder: Path, **changes: Any) -> Json:
    document: Json = yaml.safe_load(render.config(load(write_settings(folder, production_settings(**changes)))))
    return document


def run(folder: Path, *more: str) -> int:
    return main(["render", "--settings", str(folder / "settings.yml"), "--output", str(folder / "out"), *more])


def test_the_example_is_rendered_with_a_list_of_missing_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(EXAMPLE, tmp_path / "settings.yml")
    assert run(tmp_path) == 0
    output = capsys.readouterr()
    assert f"wrote {tmp_path}/out/alertmanager.yml" in output.out
    assert f"--config.file={tmp_path}/out/alertmanager.yml" in output.out
    assert "not ready for production" in output.err
    assert "email.recipients.0: 'team@example.com'" in output.err
    assert f"pagerduty.routing_key_file: {tmp_path}/secrets/pagerduty_routing_key: No such file" in output.err


def test_the_comments_of_the_example_contain_the_defaults() -> None:
    text = EXAMPLE.read_text()
    optional = text[text.index("# group_by:") :]
    shown = yaml.safe_load("\n".join(line.removeprefix("# ") for line in optional.splitlines()))
    settings = load(EXAMPLE).model_dump(mode="json")
    assert shown == {key: settings[key] for key in ("group_by", "inhibition", "timing")}


def test_the_dead_mans_silence_is_the_same_in_example_and_documentation() -> None:
    for path in (EXAMPLE, render.PACKAGE.parent / "docs/operations.md"):
        assert f"after {DEAD_MAN_SILENCE_S} s of silence" in " ".join(path.read_text().replace("#", "").split())


def test_production_rejects_the_example_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(EXAMPLE, tmp_path / "settings.yml")
    write_secrets(tmp_path / "secrets")
    assert run(tmp_path, "--production") == 2
    output = capsys.readouterr().err
    for key in (
        "runbooks_url",
        "dashboards_url",
        "email.smarthost",
        "email.sender",
        "email.recipients.0",
        "email.digest_recipients.0",
        "dead_man.url",
    ):
        assert f"{key}: '" in output
    assert "secrets/" not in output, "the secrets exist"
    assert not (tmp_path / "out").exists()


def test_production_accepts_complete_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_settings(tmp_path, production_settings())
    write_secrets(tmp_path / "secrets")
    assert run(tmp_path, "--production") == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "/-/reload" in output.out
    assert f"rule_files: [{tmp_path}/out/rules/*.yml]" in output.out
    rules = [path.name for path in (render.PACKAGE / "rules").glob("*.yml")]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == sorted(
        ["alertmanager.yml", "serve_app.tmpl", *rules]
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pagerduty_routing_key", None, "No such file"),
        ("pagerduty_routing_key", "", "one line"),
        ("pagerduty_routing_key", "\n \n", "one line"),
        ("pagerduty_routing_key", "one\ntwo\n", "one line"),
        ("pagerduty_routing_key", "your-pagerduty-key", "example"),
        ("slack_critical_url", "https://hooks.slack.com/services/YOUR/WEBHOOK/URL", "example"),
        ("slack_warning_url", "T0/B0/xyz", "the full URL"),
        ("smtp_password", "your-smtp-password", "example"),
        ("smtp_password", "good\n", "ends with a newline"),
        ("dead_man_token", "changeme", "example"),
        ("history_token", "<token>", "example"),
    ],
)
def test_production_rejects_invalid_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, message: str
) -> None:
    write_settings(tmp_path, production_settings())
    path = write_secrets(tmp_path / "secrets") / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert run(tmp_path, "--production") == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert message in error
    assert not text or not text.strip() or text.strip() not in error, "the message must not contain the secret"


def test_readable_secrets_and_unencrypted_urls_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = production_settings()
    document["dead_man"]["url"] = "http://deadman.llm.test/ping"
    write_settings(tmp_path, document)
    path = write_secrets(tmp_path / "secrets") / "history_token"
    path.chmod(0o644)
    assert run(tmp_path, "--production") == 0
    output = capsys.readouterr().err
    assert f"history.token_file: every user of this machine can read {path}" in output
    assert f"chmod 600 {path}" in output
    assert "dead_man.url: the secret is sent unencrypted" in output
    assert output.count("\n") == 3


def test_the_written_files_contain_no_secret(tmp_path: Path) -> None:
    names = {name: f"very-secret-{name}" for name in ("pagerduty_routing_key", "smtp_password", "dead_man_token")}
    write_secrets(tmp_path / "secrets", **names, slack_critical_url="https://hooks.slack.com/very-secret")
    for path in render.write(load(write_settings(tmp_path, production_settings())), tmp_path / "out"):
        assert "very-secret" not in path.read_text()


def test_secrets_are_given_as_files(tmp_path: Path) -> None:
    text = render.config(load(write_settings(tmp_path, production_settings())))
    assert set(re.findall(r"(\w+_file): ", text)) == {
        "api_url_file",
        "credentials_file",
        "routing_key_file",
        "smtp_auth_password_file",
    }
    files = re.findall(r'\w+_file: "([^"]+)"', text)
    assert all(Path(file).parent == tmp_path / "secrets" for file in files)


def test_email_without_a_login(tmp_path: Path) -> None:
    document = production_settings()
    del document["email"]["username"], document["email"]["password_file"]
    settings = load(write_settings(tmp_path, document))
    assert "smtp_auth" not in render.config(settings)
    assert "email.password_file" not in settings.secret_files()


def test_without_a_history_there_is_no_receiver_for_it(tmp_path: Path) -> None:
    document = production_settings()
    del document["history"]
    settings = load(write_settings(tmp_path, document))
    found = yaml.safe_load(render.config(settings))
    assert "history" not in {each["name"] for each in found["receivers"]}
    assert "history" not in {each["receiver"] for each in found["route"]["routes"]}
    assert found["route"]["routes"][2]["receiver"] == "critical"
    assert "history.token_file" not in settings.secret_files()
    assert not any("history" in line for line in render.warnings(settings))


def test_optional_settings_are_rendered(tmp_path: Path) -> None:
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


def test_the_links_of_the_rules_have_the_addresses_of_the_settings(tmp_path: Path) -> None:
    write_settings(tmp_path, production_settings(runbooks_url="https://llm.test/books/"))
    write_secrets(tmp_path / "secrets")
    assert run(tmp_path, "--production") == 0
    for path in (render.PACKAGE / "rules").glob("*.yml"):
        source, rendered_ = path.read_text(), (tmp_path / "out/rules" / path.name).read_text()
        assert rendered_.count("runbook_url: https://llm.test/books/") == source.count("runbook_url: ") > 0
        assert rendered_.count("dashboard_url: https://llm.test/d/serve-app-") == source.count("dashboard_url: ")
        assert "example.com" not in rendered_
        back = rendered_.replace("https://llm.test/books", slo.RUNBOOKS_URL).replace(
            "https://llm.test/d/", "DASHBOARDS/"
        )
        assert back == source.replace(f"{slo.DASHBOARDS_URL}/", "DASHBOARDS/"), "only links are changed"


def test_special_characters_are_quoted(tmp_path: Path) -> None:
    document = production_settings()
    document["slack"]["critical"]["channel"] = "#a\"b'c:{d}"
    document["email"]["username"] = "über: 'x' # y"
    found = rendered(tmp_path, **document)
    (critical,) = (one for one in found["receivers"] if one["name"] == "critical")
    assert critical["slack_configs"][0]["channel"] == "#a\"b'c:{d}"
    assert found["global"]["smtp_auth_username"] == "über: 'x' # y"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pagerdty": {}}, "pagerdty: unknown key; the keys are external_url, runbooks_url, dashboards_url"),
        (
            {"slack": {"critical": {"chanel": "#a"}}},
            "slack.critical.chanel: unknown key; the keys are channel, api_url_file",
        ),
        (
            {"timing": {"night": "1s"}},
            "timing.night: unknown key; the keys are critical, warning, digest, history, dead_man",
        ),
        ({"timing": {"dead_man": "30"}}, "timing.dead_man: '30' is not a duration above zero; examples are 30s"),
        ({"timing": {"dead_man": "0s"}}, "timing.dead_man: '0s' is not a duration above zero"),
        (
            {"timing": {"digest": {"group_wait": "1s", "group_interval": "1h", "repeat_interval": "1m"}}},
            "timing.digest: repeat_interval 1m is below group_interval 1h",
        ),
        (
            {"timing": {"history": {"group_wait": "1s", "group_interval": "1m", "repeat_interval": "2h"}}},
            "timing: history.repeat_interval 2h is above 1h",
        ),
        ({"runbooks_url": "https://git.test/a b"}, "runbooks_url: 'https://git.test/a b' is not a base address"),
        ({"runbooks_url": "https://git.test/a?b={{ 1 }}"}, "is not a base address"),
        ({"dashboards_url": "grafana.test/d"}, "dashboards_url: 'grafana.test/d' is not a URL; an example is"),
        ({"dead_man": {"url": "deadman.llm.test", "token_file": "t"}}, "dead_man.url: 'deadman.llm.test' is not a URL"),
        ({"history": {"url": "http://127.0.0.1/"}}, "history.token_file: missing; see settings.example.yml"),
        ({"business_hours": {"location": "Mars/Base"}}, "business_hours.location: 'Mars/Base' is not a time zone"),
        ({"business_hours": {"location": "../../etc/passwd"}}, "is not a time zone"),
        ({"business_hours": {"location": "UTC", "days": ["mon-fri"]}}, "business_hours.days.0: 'mon-fri' is not a day"),
        ({"business_hours": {"location": "UTC", "days": []}}, "business_hours.days: "),
        ({"business_hours": {"location": "UTC", "start": "9"}}, "business_hours.start: '9' is not a time of day"),
        (
            {"business_hours": {"location": "UTC", "start": "22:00", "end": "06:00"}},
            "start 22:00 is not before end 06:00",
        ),
        (
            {"business_hours": {"location": "UTC", "end": 1020}},
            "business_hours.end: 1020 is not text; write it in quotes",
        ),
        ({"group_by": ["a-b"]}, "group_by.0: 'a-b' is not the name of a label"),
        ({"inhibition": {"service_down": ['x"}']}}, "inhibition.service_down.0: "),
        ({"inhibition": {"spared": [".*"]}}, "inhibition.spared.0: '.*' is not a symptom"),
    ],
)
def test_an_error_names_its_key_and_a_solution(tmp_path: Path, changes: Json, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(write_settings(tmp_path, production_settings(**changes)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("smarthost", "smtp.llm.test", "has no port"),
        ("sender", "nobody", "is not an email address"),
        ("recipients", [], "email.recipients: "),
        ("recipients", ["a@b.test, c@d.test"], "Write several addresses as a list"),
        ("username", None, "username and password_file must be given together"),
    ],
)
def test_errors_in_the_email_section(tmp_path: Path, key: str, value: object, message: str) -> None:
    document = production_settings()
    document["email"][key] = value
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(write_settings(tmp_path, document))


def test_a_url_with_a_password_is_rejected_without_the_password_in_the_message(tmp_path: Path) -> None:
    document = production_settings(history={"url": "http://me:hunter2@127.0.0.1/", "token_file": "t"})
    with pytest.raises(SettingsError, match="must not contain a user or password") as caught:
        load(write_settings(tmp_path, document))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\t"])
def test_a_file_that_is_not_a_mapping(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yml").write_text(text)
    assert run(tmp_path) == 2
    assert "settings.yml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_names_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 2
    assert f"start with a copy of {EXAMPLE}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_settings(tmp_path, production_settings())
    (tmp_path / "out").write_text("a file")
    assert run(tmp_path) == 2
    assert "give another folder with --output" in capsys.readouterr().err


def test_settings_are_immutable() -> None:
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
def test_check_reports_the_errors_of_amtool(tmp_path: Path) -> None:
    path = render.write(load(EXAMPLE), tmp_path)[0]
    assert main(["check", "--output", str(tmp_path)]) == 0
    path.write_text(path.read_text().replace("receiver: digest", "receiver: no-such"))
    assert main(["check", "--output", str(tmp_path)]) == 1


@pytest.mark.parametrize("command", [[], ["render"], ["check"], ["history"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: python -m alerts {' '.join(command)}")
    assert "python -m alerts render" in output if not command else "Exit code" in output
