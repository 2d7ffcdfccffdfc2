"""Only the monotonic clock measures time: a step of the wall clock changes no deadline, limit or duration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "serve_app").rglob("*.py"))

# The functions that read the wall clock.
WALL = {
    *(f"time.{name}" for name in ("time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "asctime")),
    *(f"{owner}.{name}" for owner in ("datetime", "datetime.datetime") for name in ("now", "utcnow", "today")),
    "date.today",
    "datetime.date.today",
}
# The files that may read it, and what the time is for.
ALLOWED = {
    "serve_app/api/openai/routes.py": "the field `created` of responses",
    "serve_app/api/openai_responses/encoder.py": "the field `created_at` of responses",
    "serve_app/api/rate_limits.py": "a header with the instant at which a limit is reset",
    "serve_app/api/usage.py": "the dates of a report",
    "serve_app/api/openai_batches/service.py": "the dates of files and batches, which expire",
    "serve_app/core/usage_report.py": "the dates of a report",
    "serve_app/core/adapters.py": "orders the changes of several machines; a change always follows the one it replaces",
    "serve_app/engines/native/packed_files.py": "the age in days of files, by their times of change",
    "serve_app/gateway/cache_key.py": "the date, which a chat template can write into a prompt",
    "serve_app/gateway/experiment_state.py": "the dates between which an experiment gets more of its traffic",
    "serve_app/gateway/near_budgets.py": "the day and the month of budgets",
    "serve_app/gateway/quota_refusal.py": "the day and the month of budgets",
    "serve_app/gateway/redis_counters.py": "the day and the month of budgets; leases are of the server's clock",
    "serve_app/gateway/spending.py": "the day and the month of budgets",
    "serve_app/jobs/shared_answers.py": "instants that several machines compare in the database",
    "serve_app/jobs/worker.py": "instants that several machines compare in the database",
    "serve_app/keys_cli.py": "the state of a key, which expires at a date",
    "serve_app/tenants/audit_log.py": "when an action was taken",
    "serve_app/tenants/directory.py": "the dates at which keys expire",
    "serve_app/tenants/ledger.py": "the hours in which usage is added up",
    "serve_app/usage_cli.py": "the dates of a report",
    "serve_app/tenants/usage_store.py": "the hours in which usage is added up",
    "serve_app/tenants/store.py": "the dates of keys",
    "serve_app/tenants/tokens.py": "the dates at which tokens expire",
    "serve_app/telemetry/engine_spans.py": "the wall-clock time of instants of the monotonic clock, read once",
    "serve_app/telemetry/span_clock.py": "the wall-clock time at which a span begins",
}


def wall_clock_reads(source: str) -> list[int]:
    """The lines that name a function of WALL, called or not, or that import one of `time` by its name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            lines += [node.lineno for alias in node.names if f"time.{alias.name}" in WALL]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in WALL:
            lines.append(node.lineno)
    return sorted(lines)


def test_reads_of_the_wall_clock_are_found() -> None:
    source = (
        "import time\nfrom time import time_ns, monotonic\nfrom datetime import datetime\n"
        "a = time.monotonic()\nb = f(clock=time.time)\nc = datetime.now(UTC)\nd = datetime.fromtimestamp(0)\n"
    )
    assert wall_clock_reads(source) == [2, 5, 6]


@pytest.mark.parametrize("path", SOURCES)
def test_only_listed_files_read_the_wall_clock(path: str) -> None:
    """To measure a duration, a limit or a deadline, use time.monotonic(). A new use of the date is listed above."""
    assert bool(wall_clock_reads((ROOT / path).read_text())) == (path in ALLOWED)
