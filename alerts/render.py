"""Renders the settings to the files that Alertmanager reads, and lists what prevents their use in production."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path
from urllib.parse import urlsplit

import jinja2

from alerts.settings import Settings, is_placeholder

PACKAGE = Path(__file__).parent
CONFIG = "alertmanager.yml"
TEMPLATES = "templates/serve_app.tmpl"
INSTALL = "apt-get install -y prometheus-alertmanager"

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def config(settings: Settings) -> str:
    """The text of Alertmanager's configuration file."""
    return render_template(f"{CONFIG}.jinja", settings=settings)


def render_template(name: str, **values: object) -> str:
    """Render a template of this package. Its delimiters are [[ ]], because Alertmanager and Prometheus use {{ }}."""
    environment = jinja2.Environment(  # noqa: S701 (the templates are YAML, not HTML)
        loader=jinja2.FileSystemLoader(PACKAGE),
        undefined=jinja2.StrictUndefined,
        variable_start_string="[[",
        variable_end_string="]]",
        line_statement_prefix="#%",
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = _yaml
    return environment.get_template(name).render(values)


def _yaml(value: object) -> str:
    """`value` as JSON, which is also YAML, on one line and with all strings quoted."""
    return json.dumps(value, ensure_ascii=False, default=str)


def write(settings: Settings, folder: Path) -> list[Path]:
    """Write Alertmanager's configuration and its notification templates."""
    files = {CONFIG: config(settings), TEMPLATES: (PACKAGE / Path(TEMPLATES).name).read_text(encoding="utf-8")}
    return [write_file(folder / name, text) for name, text in files.items()]


def write_file(path: Path, text: str) -> Path:
    """Replace a file atomically: a concurrent reader sees the old text or the new one. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    return new.replace(path)


def problems(settings: Settings) -> list[str]:
    """The values and secrets that are missing, so that notifications could not be delivered. Secrets are not
    included."""
    found = [
        f"{key}: {text!r} is the value of the example; replace it" for key, text in settings.placeholders().items()
    ]
    secrets = (_secret_problem(key, path) for key, path in settings.secret_files().items())
    return found + [problem for problem in secrets if problem is not None]


def _secret_problem(key: str, path: Path) -> str | None:
    try:
        written = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        return f"{key}: {path}: {reason}; write the secret to this file, on one line, with chmod 600"
    text = written.strip()
    if not text or len(text.splitlines()) > 1:
        return f"{key}: {path}: the file must contain one line with the secret, but has {len(text.splitlines())} lines"
    if is_placeholder(text):
        return f"{key}: {path}: the file contains the text of an example; write the secret to it"
    if key.endswith("api_url_file") and urlsplit(text).scheme not in ("http", "https"):
        return (
            f"{key}: {path}: the file must contain the full URL of an incoming webhook, "
            "https://hooks.slack.com/services/..."
        )
    if key == "email.password_file" and written != text:
        return (
            f"{key}: {path}: the file ends with a newline, which Alertmanager 0.25 sends as part of the password; "
            "write it with printf %s"
        )
    return None


def warnings(settings: Settings) -> list[str]:
    """Settings that work but are not secure."""
    open_files = [
        f"{key}: every user of this machine can read {path}; run chmod 600 {shlex.quote(str(path))}"
        for key, path in settings.secret_files().items()
        if _open_to_all(path)
    ]
    urls = {"pagerduty.url": settings.pagerduty.url, "dead_man.url": settings.dead_man.url}
    if settings.history is not None:
        urls["history.url"] = settings.history.url
    unencrypted = (
        f"{key}: the secret is sent unencrypted; use https" for key, url in urls.items() if _unencrypted(url)
    )
    return [*open_files, *unencrypted]


def _open_to_all(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:  # the file is missing, or in a folder that this user cannot read
        return False


def _unencrypted(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK


def start_command(
    program: str, folder: Path, external_url: str, data: str = "data", address: str = "127.0.0.1:9093"
) -> list[str]:
    """The command of a single Alertmanager. With a cluster address it would also listen for other Alertmanagers."""
    return [
        program,
        f"--config.file={folder / CONFIG}",
        f"--storage.path={folder / data}",
        f"--web.listen-address={address}",
        f"--web.external-url={external_url}",
        "--cluster.listen-address=",
    ]
