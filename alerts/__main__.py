"""The command line `python -m alerts`: configuration files, local monitoring, the alert history, and dashboards."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alerts import history, monitor, prometheus, render, slo
from alerts.programs import ALERTMANAGER, ProgramEnded, ProgramError
from alerts.settings import EXAMPLE, SettingsError, load

MONITORING = Path(__file__).parents[1] / "cluster/monitoring"

ABOUT = f"""\
Sends alerts about the service, and records how long notification and repair took.

  critical   PagerDuty, Slack and email, at any hour
  warning    Slack and email, in business hours
  info       one digest by email
  Watchdog   a dead man's switch, which raises an alarm when it receives nothing

Every alert except Watchdog is also sent to the alert history. To run everything next to a service on this machine,
without any settings (same as `make monitor`):

  python -m alerts monitor

To send notifications:

  cp {EXAMPLE} settings.yml
  python -m alerts render --settings settings.yml --output out
  python -m alerts check --output out
  python -m alerts monitor --settings settings.yml
"""

RENDER = """\
Writes alertmanager.yml, the notification templates, and the rules of Prometheus with the links of the settings, and
prints the command that starts Alertmanager with them. Lists example addresses that were not replaced, and secret files
that are missing, empty or contain the text of an example. With --production, nothing is written until this list is
empty. The written files contain no secrets.

Exit code 0: written; 2: the settings cannot be used, or with --production are incomplete.
"""

CHECK = f"""\
Runs `amtool check-config` on the files that `render` wrote.

Exit code 0: no errors; 1: amtool found errors; 3: not checked, because amtool is not installed (Debian:
{render.INSTALL}).
"""

MONITOR = """\
Starts Prometheus, Alertmanager and the alert history on the loopback interface of this machine, with all rules loaded,
and scrapes the service. Reports when the service or Ray appears or disappears. Prometheus and Alertmanager must be
installed (Debian: apt-get install -y prometheus prometheus-alertmanager). Ctrl-C or SIGTERM stops everything.

Without --settings no notifications are sent: alerts are visible in Prometheus, in Alertmanager and in the history.
With --settings, notifications are sent as `render` configures them, but the history is the one started here. To see an
alert, stop the service: after two minutes all three show ServiceDown.

The configuration files in the folder --data are written again at every start. Metrics and the history remain there.

Exit code 0: stopped; 1: one of the programs ended by itself; 2: it cannot start.
"""

HISTORY = """\
Receives Alertmanager's webhooks at POST /webhook and records when each alert started, was first notified and was
resolved.

  GET /alerts?limit=100   newest first, as JSON; at most 1000
  GET /metrics            for Prometheus: alerts_received_total, alert_detection_seconds, alert_resolution_seconds
  GET /healthy            200, without a token

The detection time is the time from an alert's startsAt, when its rule starts to fire (after the `for` of the rule), to
its first notification here. It includes the delays of Prometheus and Alertmanager, for example group_wait. The
resolution time is the time from startsAt to endsAt. Alertmanager sends inhibited and silenced alerts to no receiver.
An alert whose end was not sent for this reason has the status `unheard` after three hours, and no resolution time.

Ctrl-C or SIGTERM stops it. Exit code 0: stopped; 2: it cannot start.
"""

DASHBOARDS = """\
Writes generated files to cluster/monitoring/: the Grafana dashboards, from the tables in alerts/dashboards/, and
prometheusrule.yaml, the rules for Kubernetes. Needs grafana-foundation-sdk: pip install 'serve_app[dashboards]'.

Exit code 0: written; 2: the package is missing, or the folder cannot be written.
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser(prog="python -m alerts", description=ABOUT, formatter_class=raw)
    commands = root.add_subparsers(
        dest="command", required=True, metavar="monitor | render | check | history | dashboards | prometheus | rules"
    )

    one = commands.add_parser(
        "monitor", help="run everything on this machine", description=MONITOR, formatter_class=raw
    )
    one.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service (%(default)s)")
    one.add_argument("--key-file", type=Path, help="file with an API key of the service, with the scope metrics")
    one.add_argument("--settings", type=Path, help=f"send notifications: a YAML file like {EXAMPLE}")
    one.add_argument("--data", type=Path, default=Path(".monitor"), help="folder, created if missing (%(default)s)")
    one.add_argument("--ray-metrics", type=Path, help="path of Ray's prom_metrics_service_discovery.json")
    for name, port in (("prometheus", 9090), ("alertmanager", 9093), ("history", 9099)):
        one.add_argument(f"--{name}-port", type=_port, default=port, help="%(default)s; 0 takes a free port")

    one = commands.add_parser("render", help="write the configuration files", description=RENDER, formatter_class=raw)
    one.add_argument("--settings", type=Path, required=True, help=f"a YAML file like {EXAMPLE}")
    one.add_argument("--output", type=Path, required=True, help="folder, created if missing")
    one.add_argument("--production", action="store_true", help="write nothing if the settings are incomplete")

    one = commands.add_parser("check", help="run amtool on the result", description=CHECK, formatter_class=raw)
    one.add_argument("--output", type=Path, required=True, help="the folder that `render` wrote")

    one = commands.add_parser("history", help="record alerts", description=HISTORY, formatter_class=raw)
    one.add_argument("--database", type=Path, required=True, help="SQLite file, created if missing")
    one.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); others need a token")
    one.add_argument("--port", type=_port, default=9099, help="%(default)s; 0 takes a free port")
    one.add_argument("--token-file", type=Path, help="file with the bearer token for all paths except /healthy")
    one.add_argument("--keep-days", type=int, default=400, help="delete alerts not notified for so long (%(default)s)")

    one = commands.add_parser(
        "dashboards", help="write the Grafana dashboards", description=DASHBOARDS, formatter_class=raw
    )
    one.add_argument("--output", type=Path, default=MONITORING, help="folder, created if missing (%(default)s)")
    one.add_argument("--runbooks", default=slo.RUNBOOKS_URL, help="base address of the runbooks (%(default)s)")
    one.add_argument("--dashboards", default=slo.DASHBOARDS_URL, help="base address of the dashboards (%(default)s)")

    one = commands.add_parser("prometheus", help="write the configurations of Prometheus for containers and Kubernetes")
    one.add_argument("--output", type=Path, default=prometheus.FOLDER, help="folder, created if missing (%(default)s)")
    one = commands.add_parser("rules", help="write alerts/rules/slo.yml from the table in alerts/slo.py")
    one.add_argument("--output", type=Path, default=slo.FILE, help="file (%(default)s)")
    return root


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port; a port is a number from 1 to 65535, or 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    match options.command:
        case "render":
            return _render(options.settings, options.output, options.production)
        case "check":
            return _check(options.output)
        case "dashboards":
            return _dashboards(options.output, options.runbooks, options.dashboards)
        case "rules":
            options.output.write_text(slo.text())
            print(f"wrote {options.output}")
            return 0
        case "prometheus":
            return _prometheus(options.output)
        case "monitor":
            return _monitor(options)
        case _:
            return _history(options)


def _render(path: Path, folder: Path, production: bool) -> int:
    try:
        settings = load(path)
        problems = render.problems(settings)
        if problems and production:
            raise SettingsError(f"{path} is not ready for production:\n" + _lines(problems))
        written = render.write(settings, folder.absolute())
        written += prometheus.write_rules(folder.absolute(), settings.runbooks_url, settings.dashboards_url)
    except SettingsError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail_to_write(error)
    _print_written(written)
    for title, found in (("not ready for production", problems), ("not secure", render.warnings(settings))):
        if found:
            print(f"{title}:\n{_lines(found)}", file=sys.stderr)
    print(f"Load the rules in Prometheus:\n  rule_files: [{folder.absolute() / prometheus.RULES}/*.yml]")
    name = next(filter(shutil.which, ALERTMANAGER), ALERTMANAGER[0])
    print(f"Start Alertmanager:\n  {shlex.join(render.start_command(name, folder.absolute(), settings.external_url))}")
    print(
        f"If Alertmanager is running already, reload it:\n  curl -X POST {settings.external_url.rstrip('/')}/-/reload"
    )
    return 0


def _lines(found: list[str]) -> str:
    return "\n".join(f"  {line}" for line in found)


def _check(folder: Path) -> int:
    file = folder / render.CONFIG
    if not file.is_file():
        return _fail(f"{file} does not exist; run python -m alerts render --settings settings.yml --output {folder}")
    amtool = shutil.which("amtool")
    if amtool is None:
        print(f"not checked: amtool is not installed; on Debian: {render.INSTALL}", file=sys.stderr)
        return 3
    return 1 if subprocess.run([amtool, "check-config", str(file)], check=False).returncode else 0


def _monitor(options: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        monitor.run(monitor.Options(**values))
    except ProgramEnded as error:
        _fail(str(error))
        return 1
    except (SettingsError, ProgramError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail_to_write(error, "--data")
    return 0


def _dashboards(folder: Path, runbooks: str, dashboards: str) -> int:
    try:
        from alerts.dashboards import write
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("grafana_foundation_sdk"):
            raise
        return _fail("grafana-foundation-sdk is not installed; run pip install 'serve_app[dashboards]'")
    try:
        written = write.write(folder, runbooks, dashboards)
    except OSError as error:
        return _fail_to_write(error)
    return _print_written(written)


def _prometheus(folder: Path) -> int:
    try:
        written = list(prometheus.write_configs(folder))
    except OSError as error:
        return _fail_to_write(error)
    return _print_written(written)


def _history(options: argparse.Namespace) -> int:
    try:
        history.run(options.host, options.port, options.database, options.token_file, options.keep_days)
    except history.HistoryError as error:
        return _fail(str(error))
    except sqlite3.Error as error:
        return _fail(f"{options.database}: {error}; give another file with --database")
    except OSError as error:
        return _fail(f"{error.filename or f'{options.host}:{options.port}'}: {error.strerror}")
    return 0


def _print_written(files: list[Path]) -> int:
    for file in files:
        print(f"wrote {file}")
    return 0


def _fail_to_write(error: OSError, option: str = "--output") -> int:
    return _fail(f"{error.filename}: {error.strerror}; give another folder with {option}")


def _fail(text: str) -> int:
    print(f"alerts: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
