"""Who is told of alerts, and where: one small file of addresses. Secrets are only ever files that it names."""

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

HEARD_EVERY_S = 3600  # at least, the history receiver is told of what still fires
# After so long a silence whoever is the dead-man's switch has to raise the alarm. It hears of life every 30 s, and for
# at most a minute after Prometheus has died: two messages may be lost, and the alarm still comes within 3 minutes.
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
    """The settings cannot be used; the text lists every fault with its key."""


def seconds(duration: str) -> float:
    """Of a duration as Alertmanager writes it: `1h30m` is 5400."""
    return sum(int(number) * _UNITS[unit] for number, unit in _DURATION.findall(duration))


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is no URL; write it like https://host/path")
    if parts.username is not None or parts.password is not None:  # Alertmanager 0.25 logs the URLs of webhooks
        raise ValueError("a URL here holds no user or password; put the secret into the file that is named beside it")
    return text


def _base(text: str) -> str:
    """It is written into the rules, whose texts are YAML and Prometheus' templates."""
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./~%+@-]*)?", text):
        raise ValueError(f"{text!r} is no address that a path can be put behind; write it like https://host/path")
    return text.rstrip("/")


def _duration(text: str) -> str:
    if not re.fullmatch(rf"(?:{_DURATION.pattern})+", text) or seconds(text) == 0:
        raise ValueError(f"{text!r} is no duration above zero; write it like 30s, 5m or 1h30m")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"[^@\s,]+@[^@\s,]+", text):
        raise ValueError(f"{text!r} is no mail address; write it like team@host, and several as a list")
    return text


def _channel(text: str) -> str:
    if not re.fullmatch(r"[#@]\S+", text):
        raise ValueError(f"{text!r} is no channel; write it like '#alerts' (in quotes, or YAML takes it for a comment)")
    return text


def _smarthost(text: str) -> str:
    if not re.fullmatch(r"\S+:\d{1,5}", text):
        raise ValueError(f"{text!r} has no port; write it like smtp.host:587")
    return text


def _location(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{text!r} is no time zone of this system; write it like Europe/Berlin or UTC") from None
    return text


def _days(text: str) -> str:
    if not _DAYS.fullmatch(text):
        raise ValueError(f"{text!r} is no day or range of days; write it like monday:friday, or saturday")
    return text


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError(f"{text!r} is no time of day; write it like '09:00', in quotes")
    return text


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a label or an alert; letters, digits and _ make one")
    return text


def _symptom(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]+", text):
        raise ValueError(f"{text!r} is no symptom; small letters, digits and - make one")
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
    """An integration of the kind Events API v2."""

    routing_key_file: Path
    url: Url = "https://events.pagerduty.com/v2/enqueue"


class Slack(Section):
    """Each channel with its own incoming webhook: an app's webhook posts to the channel it was made for."""

    class Place(Section):
        channel: Channel
        api_url_file: Path

    critical: Place
    warning: Place


class Email(Section):
    """`smarthost` takes mail with STARTTLS, and after a login if there is a `username`."""

    smarthost: Smarthost
    sender: Address
    recipients: tuple[Address, ...] = Field(min_length=1)
    digest_recipients: tuple[Address, ...] = Field(min_length=1)
    username: str | None = None
    password_file: Path | None = None
    require_tls: bool = True

    @model_validator(mode="after")
    def _login_is_whole(self) -> Email:
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file go together; give both, or neither")
        return self


class Webhook(Section):
    """`token_file` holds the bearer token."""

    url: Url
    token_file: Path


class BusinessHours(Section):
    """When warnings are told. From `start` to `end` on `days`, in the time of `location`."""

    location: Location
    days: tuple[Days, ...] = Field(("monday:friday",), min_length=1)
    start: Time = "09:00"
    end: Time = "17:00"

    @model_validator(mode="after")
    def _ordered(self) -> BusinessHours:
        if self.start >= self.end:
            raise ValueError(f"start {self.start} is not before end {self.end}; hours over midnight are not possible")
        return self


class Wait(Section):
    """How long a new group of alerts is waited for, how often its changes are told, and when it is told again."""

    group_wait: Duration
    group_interval: Duration
    repeat_interval: Duration

    @model_validator(mode="after")
    def _ordered(self) -> Wait:
        if seconds(self.repeat_interval) < seconds(self.group_interval):
            raise ValueError(
                f"repeat_interval {self.repeat_interval} is below group_interval {self.group_interval}, "
                "at which alone Alertmanager looks; make it the same or longer"
            )
        return self


def _wait(group_wait: str, group_interval: str, repeat_interval: str) -> Wait:
    return Wait(group_wait=group_wait, group_interval=group_interval, repeat_interval=repeat_interval)


class Timing(Section):
    """`history` waits as `critical` does: the first notification that it measures is then the page's.

    `dead_man` is how often the dead-man's switch is told that everything works.
    """

    critical: Wait = _wait("10s", "1m", "4h")
    warning: Wait = _wait("30s", "5m", "12h")
    digest: Wait = _wait("30m", "12h", "1d")
    history: Wait = _wait("10s", "1m", "1h")
    dead_man: Duration = "30s"

    @model_validator(mode="after")
    def _history_hears_often(self) -> Timing:
        if seconds(self.history.repeat_interval) > HEARD_EVERY_S:
            raise ValueError(
                f"history.repeat_interval {self.history.repeat_interval} is above 1h: the history takes an alert that "
                "it has not heard of for three hours for one whose end it was not told"
            )
        return self


class Inhibition(Section):
    """Which alerts keep quiet while another one fires.

    A more severe alert silences a less severe one with the same name or the same label `symptom`, in the same place:
    all labels in `place` are equal, or missing in both. While an alert in `service_down` fires, all others of its
    cluster that have a symptom are silent; one without is somebody else's. Alerts with a symptom in `spared` are
    silenced by neither: what watches the watchers, and what may be the cause.

    Alertmanager keeps back ends too: who was told of an alert that is then silenced so, and resolved meanwhile, is not
    told that it is over (seen with 0.25).
    """

    place: tuple[Name, ...] = ("cluster", "model")
    service_down: tuple[Name, ...] = Field(("ServiceDown",), min_length=1)
    spared: tuple[Symptom, ...] = Field(("monitoring", "deploy", "disk", "replicas"), min_length=1)


class Settings(Section):
    """`group_by` are the labels that alerts told together have in common.

    Without `history` nobody keeps when alerts fired and ended, and the dashboards know no MTTD and no MTTR. Links of
    alerts are `runbooks_url`/NAME.md and `dashboards_url`/UID.
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
        """Every file with a secret, by its key."""
        return {key: value for key, value in self._leaves() if isinstance(value, Path)}

    def placeholders(self) -> dict[str, str]:
        """What the example has and nobody changed, by its key."""
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
    """Paths of secrets become absolute; they are meant from the settings file's folder. Raises SettingsError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; begin with a copy of {EXAMPLE}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: not a mapping of keys; begin with a copy of {EXAMPLE}")
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
    """Every fault, one a line: its key, what is wrong, and what would work."""
    return "\n".join(f"  {_key(fault['loc'])}: {_sentence(fault)}" for fault in error.errors())


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "(top)"


def _sentence(fault: Any) -> str:
    match fault["type"]:
        case "missing":
            return f"missing; {EXAMPLE.name} shows it"
        case "extra_forbidden":
            return f"no such key; there are {', '.join(_keys(fault['loc'][:-1]))}"
        case "string_type":  # 17:00 without quotes is 1020 to YAML
            return f"{fault['input']!r} is no text; put it in quotes"
        case _:
            return str(fault["msg"]).removeprefix("Value error, ")


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section there."""
    section: type[BaseModel] = Settings
    for name in location:
        annotation = section.model_fields[str(name)].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return list(section.model_fields)
