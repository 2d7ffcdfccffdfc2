"""The settings file: the receivers of alerts. It contains addresses and the paths of secret files, but no secrets."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

EXAMPLE = Path(__file__).with_name("settings.example.yml")

HISTORY_REPEAT_S = 3600  # the history receives firing alerts at least this often
# The dead man's switch must raise an alarm after this time without a message. Alertmanager sends one every 30 s, and
# for at most 60 s after Prometheus has stopped. So two messages may be lost, and the alarm arrives within 3 minutes.
DEAD_MAN_SILENCE_S = 90

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+)(ms|s|m|h|d)")
_DAY = "(?:sunday|monday|tuesday|wednesday|thursday|friday|saturday)"
_DAYS = re.compile(rf"{_DAY}(?::{_DAY})?")
_TIME = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d|24:00")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_PLACEHOLDER = re.compile(
    r"\bexample\.(com|org|net)\b|\.example\b|\byour[-_/ ]|/your\b|change[-_ ]?me|\btodo\b|<[^>]*>|x{4}", re.IGNORECASE
)


class SettingsError(Exception):
    """The settings cannot be used. The message lists every error with its key."""


def seconds(duration: str) -> float:
    """The seconds of a duration in the format of Alertmanager: `1h30m` is 5400."""
    return sum(int(number) * _UNITS[unit] for number, unit in _DURATION.findall(duration))


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is not a URL; an example is https://host/path")
    if parts.username is not None or parts.password is not None:  # Alertmanager 0.25 logs the URLs of webhooks
        raise ValueError("a URL must not contain a user or password; write the secret to the file named next to it")
    return text


def _base(text: str) -> str:
    """Check a base address strictly, because it is inserted into the rules, which are YAML and Prometheus templates."""
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./~%+@-]*)?", text):
        raise ValueError(f"{text!r} is not a base address; an example is https://host/path")
    return text.rstrip("/")


def _duration(text: str) -> str:
    if not re.fullmatch(rf"(?:{_DURATION.pattern})+", text) or seconds(text) == 0:
        raise ValueError(f"{text!r} is not a duration above zero; examples are 30s, 5m and 1h30m")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"[^@\s,]+@[^@\s,]+", text):
        raise ValueError(
            f"{text!r} is not an email address; an example is team@host. Write several addresses as a list"
        )
    return text


def _channel(text: str) -> str:
    if not re.fullmatch(r"[#@]\S+", text):
        raise ValueError(
            f"{text!r} is not a channel; an example is '#alerts', in quotes because # starts a comment in YAML"
        )
    return text


def _smarthost(text: str) -> str:
    if not re.fullmatch(r"\S+:\d{1,5}", text):
        raise ValueError(f"{text!r} has no port; an example is smtp.host:587")
    return text


def _location(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{text!r} is not a time zone of this system; examples are Europe/Berlin and UTC") from None
    return text


def _days(text: str) -> str:
    if not _DAYS.fullmatch(text):
        raise ValueError(f"{text!r} is not a day or a range of days; examples are monday:friday and saturday")
    return text


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError(f"{text!r} is not a time of day; an example is '09:00', in quotes")
    return text


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a label or an alert; use letters, digits and _")
    return text


def _symptom(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]+", text):
        raise ValueError(f"{text!r} is not a symptom; use lower-case letters, digits and -")
    return text


Url = Annotated[str, AfterValidator(_url)]
Base = Annotated[str, AfterValidator(_url), AfterValidator(_base)]
Duration = Annotated[str, AfterValidator(_duration)]
Address = Annotated[str, AfterValidator(_address)]
Channel = Annotated[str, AfterValidator(_channel)]
Smarthost = Annotated[str, AfterValidator(_smarthost)]
Location = Annotated[str, AfterValidator(_location)]
Days = Annotated[str, AfterValidator(_days)]
Time = Annotated[str, AfterValidator(_time)]
Name = Annotated[str, AfterValidator(_label)]
Symptom = Annotated[str, AfterValidator(_symptom)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PagerDuty(Section):
    """An integration of the type Events API v2."""

    routing_key_file: Path
    url: Url = "https://events.pagerduty.com/v2/enqueue"


class Slack(Section):
    """Channels, each with its own incoming webhook, because a webhook of a Slack app posts to a fixed channel."""

    class Destination(Section):
        channel: Channel
        api_url_file: Path

    critical: Destination
    warning: Destination


class Email(Section):
    """`smarthost` accepts mail with STARTTLS, after a login if `username` is set."""

    smarthost: Smarthost
    sender: Address
    recipients: tuple[Address, ...] = Field(min_length=1)
    digest_recipients: tuple[Address, ...] = Field(min_length=1)
    username: str | None = None
    password_file: Path | None = None
    require_tls: bool = True

    @model_validator(mode="after")
    def _login_is_complete(self) -> Email:
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file must be given together")
        return self


class Webhook(Section):
    """`token_file` is the path of a file with the bearer token."""

    url: Url
    token_file: Path


class BusinessHours(Section):
    """When warnings are sent: from `start` to `end` on `days`, in the time zone `location`."""

    location: Location
    days: tuple[Days, ...] = Field(("monday:friday",), min_length=1)
    start: Time = "09:00"
    end: Time = "17:00"

    @model_validator(mode="after")
    def _ordered(self) -> BusinessHours:
        if self.start >= self.end:
            raise ValueError(
                f"start {self.start} is not before end {self.end}; hours across midnight are not supported"
            )
        return self


class GroupTiming(Section):
    """The delay of a new group's first notification, the interval of its changes, and the interval of its
    repetitions."""

    group_wait: Duration
    group_interval: Duration
    repeat_interval: Duration

    @model_validator(mode="after")
    def _ordered(self) -> GroupTiming:
        if seconds(self.repeat_interval) < seconds(self.group_interval):
            raise ValueError(
                f"repeat_interval {self.repeat_interval} is below group_interval {self.group_interval}; "
                "it must be at least as long, because Alertmanager checks a group once per group_interval"
            )
        return self


def _timing(group_wait: str, group_interval: str, repeat_interval: str) -> GroupTiming:
    return GroupTiming(group_wait=group_wait, group_interval=group_interval, repeat_interval=repeat_interval)


class Timing(Section):
    """`history` has the timing of `critical`, so that the detection time that it measures is that of a page.

    `dead_man` is the interval of the messages to the dead man's switch.
    """

    critical: GroupTiming = _timing("10s", "1m", "4h")
    warning: GroupTiming = _timing("30s", "5m", "12h")
    digest: GroupTiming = _timing("30m", "12h", "1d")
    history: GroupTiming = _timing("10s", "1m", "1h")
    dead_man: Duration = "30s"

    @model_validator(mode="after")
    def _history_repeats_often(self) -> Timing:
        if seconds(self.history.repeat_interval) > HISTORY_REPEAT_S:
            raise ValueError(
                f"history.repeat_interval {self.history.repeat_interval} is above 1h; this is too long, because the "
                "history marks an alert as `unheard` after three hours without a notification"
            )
        return self


class Inhibition(Section):
    """Which alerts Alertmanager suppresses while another alert fires.

    A more severe alert suppresses a less severe one with the same name or the same label `symptom`, if all labels in
    `place` are equal or missing in both. While an alert in `service_down` fires, all other alerts of its cluster that
    have a symptom are suppressed; alerts without a symptom belong to other services. Alerts with a symptom in `spared`
    are about the monitoring itself or may be the cause, so only a more severe alert with the same name suppresses
    them.

    If an alert is suppressed after its first notification and is resolved meanwhile, Alertmanager does not send its end
    (observed with version 0.25).
    """

    place: tuple[Name, ...] = ("cluster", "model")
    service_down: tuple[Name, ...] = Field(("ServiceDown",), min_length=1)
    spared: tuple[Symptom, ...] = Field(("monitoring", "deploy", "disk", "replicas"), min_length=1)


class Settings(Section):
    """All settings. Alerts with equal labels `group_by` are sent in one notification.

    Without `history` no alert history is recorded, so the dashboards have no MTTD and no MTTR. The links in alerts are
    `runbooks_url`/NAME.md and `dashboards_url`/UID.
    """

    external_url: Url = "http://127.0.0.1:9093"
    runbooks_url: Base
    dashboards_url: Base
    pagerduty: PagerDuty
    slack: Slack
    email: Email
    dead_man: Webhook
    history: Webhook | None = None
    business_hours: BusinessHours
    group_by: tuple[Name, ...] = Field(("alertname", "cluster", "model"), min_length=1)
    inhibition: Inhibition = Inhibition()
    timing: Timing = Timing()

    def secret_files(self) -> dict[str, Path]:
        """The paths of all secret files by key."""
        return {key: value for key, value in self._leaves() if isinstance(value, Path)}

    def placeholders(self) -> dict[str, str]:
        """The values that are still those of the example, by key."""
        texts = {key: value for key, value in self._leaves() if isinstance(value, str)}
        return {key: text for key, text in texts.items() if is_placeholder(text)}

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        return _leaves(self.model_dump(), ())


def is_placeholder(text: str) -> bool:
    return _PLACEHOLDER.search(text) is not None


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield ".".join(path), value


def load(path: Path) -> Settings:
    """Read a settings file. Relative paths of secrets are relative to its folder. Raises SettingsError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; start with a copy of {EXAMPLE}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: the file is not a mapping of keys; start with a copy of {EXAMPLE}")
    try:
        return Settings.model_validate(_absolute(document, path.absolute().parent))
    except ValidationError as error:
        raise SettingsError(f"{path}:\n{describe(error)}") from None


def _absolute(value: Any, folder: Path) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / inner) if str(key).endswith("_file") and isinstance(inner, str) else _absolute(inner, folder)
        for key, inner in value.items()
    }


def describe(error: ValidationError) -> str:
    """All errors, one per line: the key, the error and a solution."""
    return "\n".join(f"  {_key(one['loc'])}: {_sentence(one)}" for one in error.errors())


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "(top)"


def _sentence(error: Any) -> str:
    match error["type"]:
        case "missing":
            return f"missing; see {EXAMPLE.name}"
        case "extra_forbidden":
            return f"unknown key; the keys are {', '.join(_keys(error['loc'][:-1]))}"
        case "string_type":  # YAML reads 17:00 without quotes as 1020
            return f"{error['input']!r} is not text; write it in quotes"
        case _:
            return str(error["msg"]).removeprefix("Value error, ")


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at this location."""
    section: type[BaseModel] = Settings
    for name in location:
        annotation = section.model_fields[str(name)].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return list(section.model_fields)
