"""`python -m alerts`: what Prometheus and Alertmanager read, both of them started, and the history of alerts."""

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
from alerts.programs import ALERTMANAGER, Ended, ProgramError
from alerts.settings import EXAMPLE, SettingsError, load

MONITORING = Path(__file__).parents[1] / "cluster/monitoring"

ABOUT = f"""\
Who is told of alerts, and how long it took.

  critical   PagerDuty, Slack and e-mail, at any hour
  warning    Slack and e-mail, in business hours
  info       one digest by e-mail
  Watchdog   a dead-man's switch, which raises the alarm when it hears nothing

Every alert but Watchdog is told to the history receiver as well. To see all of it work beside a service on this
machine, without any settings (`make monitor` does this):

  python -m alerts monitor

To tell people:

  cp {EXAMPLE} settings.yml
  python -m alerts render --settings settings.yml --output out
  python -m alerts check --output out
  python -m alerts monitor --settings settings.yml
"""

RENDER = """\
Writes alertmanager.yml, the templates of its messages, and Prometheus' rules with the settings' links, and says how to
start Alertmanager with them. What is not filled in yet is listed; with --production it is refused, and nothing is
written: addresses of the example, and secret files that are missing, empty or hold an example's text. Secrets are never
read into what is written.

Exit code 0: written; 2: the settings cannot be used, or not in production.
"""

CHECK = f"""\
Runs `amtool check-config` on what `render` wrote.

Exit code 0: clean; 1: amtool found faults; 3: nothing was checked, amtool is missing (Debian: {render.INSTALL}).
"""

MONITOR = """\
Starts Prometheus, Alertmanager and the history of alerts on this machine's loopback, with all rules loaded, and watches
the service there; when something does not answer yet, it says so and goes on. Prometheus and Alertmanager are the
system's (Debian: apt-get install -y prometheus prometheus-alertmanager). Ctrl-C, or SIGTERM, stops everything.

Without --settings nobody is told of alerts: they are in Prometheus, in Alertmanager and in the history. With it, they
are told as `render` would have it, but that the history is the one started here. To see an alert, stop the service:
after two minutes ServiceDown is at all three.

Files are written anew at every start, into the folder --data; what was measured and the history stay there.

Exit code 0: stopped; 1: one of the programs ended by itself; 2: it cannot start.
"""

HISTORY = """\
Takes Alertmanager's webhooks at POST /webhook and keeps when each alert began, was first told of and was resolved.

  GET /alerts?limit=100   the newest first, as JSON; at most 1000
  GET /metrics            for Prometheus: alerts_received_total, alert_detection_seconds, alert_resolution_seconds
  GET /healthy            200, without a token

Detection is the time from an alert's startsAt, when its rule began to fire (after the rule's `for`), to its first
notification here: Prometheus's and Alertmanager's share, group_wait among it. Resolution is startsAt to endsAt. Alerts
that are inhibited or silenced are not told to any receiver, and so not to this one; if that hides the end of one, it
is `unheard` after three hours, and no resolution is counted.

Stop it with Ctrl-C or SIGTERM. Exit code 0: stopped; 2: it cannot start.
"""

DASHBOARDS = """\
Writes what cluster/monitoring/ has from here: Grafana's dashboards, from the tables in alerts/dashboards/, and the
rules as a PrometheusRule for Kubernetes. Needs grafana-foundation-sdk: pip install 'serve_app[dashboards]'.

Exit code 0: written; 2: the package is missing, or the folder cannot be written.
"""


def parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="python -m alerts", description=ABOUT, formatter_class=as_written)
    commands = whole.add_subparsers(
        dest="command", required=True, metavar="monitor | render | check | history | dashboards | prometheus | rules"
    )

    one = commands.add_parser("monitor", help="start all of it here", description=MONITOR, formatter_class=as_written)
    one.add_argument("--url", default="http://127.0.0.1:8000", help="the service (%(default)s)")
    one.add_argument("--settings", type=Path, help=f"tell people: a YAML file like {EXAMPLE}")
    one.add_argument("--data", type=Path, default=Path(".monitor"), help="a folder, made if not there (%(default)s)")
    one.add_argument("--ray-metrics", type=Path, help="prom_metrics_service_discovery.json of a Ray that is not found")
    for name, port in (("prometheus", 9090), ("alertmanager", 9093), ("history", 9099)):
        one.add_argument(f"--{name}-port", type=_port, default=port, help="%(default)s; 0 takes a free one")

    one = commands.add_parser(
        "render", help="settings to what both read", description=RENDER, formatter_class=as_written
    )
    one.add_argument("--settings", type=Path, required=True, help=f"a YAML file like {EXAMPLE}")
    one.add_argument("--output", type=Path, required=True, help="a folder, made if it is not there")
    one.add_argument("--production", action="store_true", help="refuse what would reach nobody")

    one = commands.add_parser("check", help="amtool on the result", description=CHECK, formatter_class=as_written)
    one.add_argument("--output", type=Path, required=True, help="the folder that `render` wrote")

    one = commands.add_parser("history", help="keep when alerts were", description=HISTORY, formatter_class=as_written)
    one.add_argument("--database", type=Path, required=True, help="an SQLite file, made if it is not there")
    one.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s); elsewhere needs a token")
    one.add_argument("--port", type=_port, default=9099, help="%(default)s; 0 takes a free one")
    one.add_argument("--token-file", type=Path, help="the bearer token that all but /healthy then need")
    one.add_argument("--keep-days", type=int, default=400, help="forget alerts not told of for so long (%(default)s)")

    one = commands.add_parser(
        "dashboards", help="write cluster/monitoring/", description=DASHBOARDS, formatter_class=as_written
    )
    one.add_argument("--output", type=Path, default=MONITORING, help="a folder, made if it is not there (%(default)s)")
    one.add_argument("--runbooks", default=slo.RUNBOOKS, help="where people read the runbooks (%(default)s)")
    one.add_argument("--dashboards", default=slo.DASHBOARDS, help="where alerts link Grafana's to (%(default)s)")

    commands.add_parser("rules", help="write rules/slo.yml, which is made of the table in slo.py")
    commands.add_parser("prometheus", help="write cluster/monitoring/prometheus/, for containers and Kubernetes")
    return whole


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port; a port is 1 to 65535, or 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    match asked.command:
        case "render":
            return _render(asked.settings, asked.output, asked.production)
        case "check":
            return _check(asked.output)
        case "dashboards":
            return _dashboards(asked.output, asked.runbooks, asked.dashboards)
        case "rules":
            slo.FILE.write_text(slo.text())
            print(f"wrote {slo.FILE}")
            return 0
        case "prometheus":
            for file in prometheus.write_kept():
                print(f"wrote {file}")
            return 0
        case "monitor":
            return _monitor(asked)
        case _:
            return _history(asked)


def _render(path: Path, folder: Path, production: bool) -> int:
    try:
        settings = load(path)
        obstacles = render.obstacles(settings)
        if obstacles and production:
            raise SettingsError(f"{path} is not ready for production:\n" + _lines(obstacles))
        written = render.write(settings, folder.absolute())
        written += prometheus.write_rules(folder.absolute(), settings.runbooks_url, settings.dashboards_url)
    except SettingsError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}; give another --output")
    for file in written:
        print(f"wrote {file}")
    for title, found in (("not ready for production", obstacles), ("not safe", render.dangers(settings))):
        if found:
            print(f"{title}:\n{_lines(found)}", file=sys.stderr)
    print(f"Prometheus is to read the rules:\n  rule_files: [{folder.absolute() / prometheus.RULES}/*.yml]")
    name = next(filter(shutil.which, ALERTMANAGER), ALERTMANAGER[0])
    print(f"start Alertmanager:\n  {shlex.join(render.start_command(name, folder.absolute(), settings.external_url))}")
    print(f"or, if it runs, let it read them:\n  curl -X POST {settings.external_url.rstrip('/')}/-/reload")
    return 0


def _lines(found: list[str]) -> str:
    return "\n".join(f"  {line}" for line in found)


def _check(folder: Path) -> int:
    file = folder / render.CONFIG
    if not file.is_file():
        return _fail(f"{file} is not there; python -m alerts render --settings settings.yml --output {folder}")
    amtool = shutil.which("amtool")
    if amtool is None:
        print(f"nothing was checked: amtool is missing; on Debian: {render.INSTALL}", file=sys.stderr)
        return 3
    return 1 if subprocess.run([amtool, "check-config", str(file)], check=False).returncode else 0


def _monitor(asked: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(asked).items() if name != "command"}
    try:
        monitor.run(monitor.Wanted(**given))
    except Ended as error:
        _fail(str(error))
        return 1
    except (SettingsError, ProgramError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}; give another --data")
    return 0


def _dashboards(folder: Path, runbooks: str, dashboards: str) -> int:
    try:
        from alerts.dashboards import write
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("grafana_foundation_sdk"):
            raise
        return _fail("grafana-foundation-sdk is missing; pip install 'serve_app[dashboards]'")
    try:
        written = write.write(folder, runbooks, dashboards)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}; give another --output")
    for file in written:
        print(f"wrote {file}")
    return 0


def _history(asked: argparse.Namespace) -> int:
    try:
        history.run(asked.host, asked.port, asked.database, asked.token_file, asked.keep_days)
    except history.HistoryError as error:
        return _fail(str(error))
    except sqlite3.Error as error:
        return _fail(f"{asked.database}: {error}; give another --database")
    except OSError as error:
        return _fail(f"{error.filename or f'{asked.host}:{asked.port}'}: {error.strerror}")
    return 0


def _fail(text: str) -> int:
    print(f"alerts: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
