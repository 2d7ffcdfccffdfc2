"""Settings to the files that Alertmanager reads, and what stands in the way of using them."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path
from urllib.parse import urlsplit

import jinja2

from alerts.settings import Settings, is_placeholder

HERE = Path(__file__).parent
CONFIG = "alertmanager.yml"
MESSAGES = "templates/serve_app.tmpl"
INSTALL = "apt-get install -y prometheus-alertmanager"

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def config(settings: Settings) -> str:
    """Alertmanager's configuration."""
    return fill(f"{CONFIG}.jinja", settings=settings)


def fill(template: str, **values: object) -> str:
    """A template of this folder. Its marks leave the {{ }} alone that Alertmanager and Prometheus have."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        variable_start_string="[[",
        variable_end_string="]]",
        line_statement_prefix="#%",
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = _yaml
    return environment.get_template(template).render(values)


def _yaml(value: object) -> str:
    """What is JSON is YAML, on one line and with every text in quotes."""
    return json.dumps(value, ensure_ascii=False, default=str)


def write(settings: Settings, folder: Path) -> list[Path]:
    """Alertmanager's files."""
    files = {CONFIG: config(settings), MESSAGES: (HERE / Path(MESSAGES).name).read_text(encoding="utf-8")}
    return [replace(folder / name, text) for name, text in files.items()]


def replace(path: Path, text: str) -> Path:
    """Write a file that whoever reads it meanwhile sees as it was or as it is. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    return new.replace(path)


def obstacles(settings: Settings) -> list[str]:
    """Why nobody would be told: what is not filled in yet, and secrets that are not there."""
    found = [f"{key}: {text!r} is the example's; put yours there" for key, text in settings.placeholders().items()]
    secrets = (_secret_obstacle(key, path) for key, path in settings.secret_files().items())
    return found + [obstacle for obstacle in secrets if obstacle is not None]


def _secret_obstacle(key: str, path: Path) -> str | None:
    try:
        written = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        return f"{key}: {path}: {reason}; write the secret there, on one line, for its user alone (chmod 600)"
    text = written.strip()
    if not text or len(text.splitlines()) > 1:
        return f"{key}: {path}: expected one line with the secret, found {len(text.splitlines())}"
    if is_placeholder(text):
        return f"{key}: {path}: holds the text of an example; put the secret there"
    if key.endswith("api_url_file") and urlsplit(text).scheme not in ("http", "https"):
        return f"{key}: {path}: expected the whole URL of an incoming webhook, https://hooks.slack.com/services/..."
    if key == "email.password_file" and written != text:
        return f"{key}: {path}: ends in a new line, which Alertmanager 0.25 sends as part of the password; printf %s it"
    return None


def dangers(settings: Settings) -> list[str]:
    """What works and is not safe."""
    open_files = [
        f"{key}: {path} can be read by every user of this machine; chmod 600 {shlex.quote(str(path))}"
        for key, path in settings.secret_files().items()
        if _open_to_all(path)
    ]
    urls = {"pagerduty.url": settings.pagerduty.url, "dead_man.url": settings.dead_man.url}
    if settings.history is not None:
        urls["history.url"] = settings.history.url
    return open_files + [f"{key}: sends its secret unencrypted; use https" for key, url in urls.items() if _bare(url)]


def _open_to_all(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:  # not there, or in a folder of somebody else's
        return False


def _bare(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK


def start_command(
    program: str, folder: Path, external_url: str, data: str = "data", address: str = "127.0.0.1:9093"
) -> list[str]:
    """Alertmanager alone, on loopback. Without the empty cluster address it would listen to other Alertmanagers too."""
    return [
        program,
        f"--config.file={folder / CONFIG}",
        f"--storage.path={folder / data}",
        f"--web.listen-address={address}",
        f"--web.external-url={external_url}",
        "--cluster.listen-address=",
    ]
