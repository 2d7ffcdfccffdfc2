"""Locust load test of an LLM service: adds TTFT, TPOT and token counts to Locust's request statistics.

    locust -f perf/locustfile.py --host http://localhost:8000            # web UI at http://localhost:8089
    locust -f perf/locustfile.py --headless -u 8 -r 8 -t 60s             # without the web UI
    locust -f perf/locustfile.py --headless --step-users 4 --step-seconds 30 --steps 5
    python -m perf.locustfile                                            # lists its options

Locust's users are a closed loop: a user sends its next request after its response, so a server that stalls gets fewer
requests. Locust rounds percentiles; averages and totals are exact. `python -m perf.suite` has neither limitation.
"""

# mypy: disable-error-code="misc, untyped-decorator"
# Locust has no type annotations.

from __future__ import annotations

import itertools
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import get_parser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS

from perf.dialects import DIALECTS, Dialect, ResponseData
from perf.workload import Workload

_user_numbers = itertools.count()


class StreamError(Exception):
    """The stream contains an error or is incomplete."""


@dataclass(slots=True)
class StreamResult:
    """Times of the performance counter in seconds; `counted` is the server's token count, if it sends one."""

    first: float | None = None
    last: float = 0.0
    events: int = 0
    counted: int | None = None
    ended: bool = False

    @property
    def tokens(self) -> int:
        return self.events if self.counted is None else self.counted

    def add(self, data: ResponseData, at: float) -> None:
        self.counted = self.counted if data.tokens is None else data.tokens
        if data.token:
            self.events += 1
            self.first = at if self.first is None else self.first
            self.last = at


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    add = parser.add_argument
    add("--api", choices=sorted(DIALECTS), default="native", help="API of the server (default native)")
    add("--model", default="", help="model name; not sent if empty")
    add("--prompt", default="", help="the same prompt for all requests, which a prefix cache makes cheap")
    add("--prompt-words", type=int, default=40, metavar="N", help="length of the random prompts (default 40)")
    add("--prompt-seed", type=int, default=7, metavar="N", help="seed of the random prompts (default 7)")
    add("--max-tokens", type=int, default=64, metavar="N", help="length of the responses in tokens (default 64)")
    add("--ignore-eos", action="store_true", help="responses of exactly --max-tokens, if the server has ignore_eos")
    # Options in a group are not in the form of the web UI, which must not show a key and is too late for a load shape.
    group = parser.add_argument_group("LLM options of the command line")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the bearer token")
    add_step = partial(group.add_argument, type=int, metavar="N")
    add_step("--step-users", default=0, help="users added per step, instead of -u and -r")
    add_step("--step-seconds", default=30, help="length of a step in seconds (default 30)")
    add_step("--steps", default=5, help="number of steps (default 5), after which the test ends")


class Steps(LoadTestShape):
    """Adds users step by step. `abstract`: Locust would otherwise use it without --step-users."""

    abstract = True

    def __init__(self, options: Namespace) -> None:
        super().__init__()
        self._options = options

    def tick(self) -> tuple[int, float] | None:
        step = int(self.get_run_time() // self._options.step_seconds)
        if step >= self._options.steps:
            return None
        return (step + 1) * self._options.step_users, float(self._options.step_users)


@events.init.add_listener
def use_steps(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    if options.step_users:
        if min(options.step_users, options.step_seconds, options.steps) < 1:
            raise SystemExit("--step-users, --step-seconds and --steps must be 1 or more")
        environment.shape_class = Steps(options)
        environment.shape_class.runner = environment.runner


class StreamingUser(FastHttpUser):
    """Sends a streaming request, reads its response to the end, and repeats."""

    host = "http://localhost:8000"
    concurrency = 1
    network_timeout = 600.0

    def on_start(self) -> None:
        options = self.environment.parsed_options
        workload = Workload(options.prompt_words, options.max_tokens, options.prompt_seed, options.prompt or None)
        worker = getattr(self.environment.runner, "worker_index", 0)
        self._requests = workload.requests(f"{worker}-{next(_user_numbers)}")
        key = options.api_key_file
        self._headers = {"Authorization": f"Bearer {key.read_text().strip()}"} if key else {}

    @task
    def generate(self) -> None:
        options = self.environment.parsed_options
        dialect = DIALECTS[options.api](options.model or None, options.ignore_eos)
        request = next(self._requests)
        started = time.perf_counter()
        with self.client.post(
            dialect.path(request), json=dialect.body(request), headers=self._headers, stream=True, catch_response=True
        ) as response:
            status = response.status_code
            if status == 200:
                self._read(response, dialect, started)
            elif status:
                # The kind without the server's message: Locust groups failures by their text.
                response.failure(f"http {status}")
            # Status 0 is a connection error, which Locust reports itself.
            response.request_meta["response_time"] = _ms(time.perf_counter() - started)
        if status in (0, 429, 503):
            time.sleep(_retry_after(response))  # patched by gevent

    def _read(self, response: Any, dialect: Dialect, started: float) -> None:
        result = StreamResult()
        try:
            for event, at in _events(response.stream):
                if event == dialect.end:
                    result.ended = True
                    continue
                data = _parse(dialect, event)
                result.add(data, at)
                result.ended = result.ended or (dialect.end is None and data.tokens is not None)
            if not result.ended:
                raise StreamError("cut short")
        except StreamError as error:
            response.failure(str(error))
        except FAILURE_EXCEPTIONS as error:
            response.failure(f"cut short: {type(error).__name__}")
        else:
            self._report(response.request_meta["name"], result, started)

    def _report(self, name: str, result: StreamResult, started: float) -> None:
        if result.first is not None:
            self._fire("TTFT", name, _ms(result.first - started))
            if result.tokens > 1 and result.events > 1:
                self._fire("TPOT", name, _ms(result.last - result.first) / (result.tokens - 1))
        self._fire("tokens", name, result.tokens)

    def _fire(self, kind: str, name: str, value: float) -> None:
        """Locust has one kind of value, labelled ms; for `tokens` the value is tokens per response."""
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=value, response_length=0, exception=None, context={}
        )


def _events(stream: Any) -> Iterator[tuple[bytes, float]]:
    """Values of `data:` lines with their arrival times. Reads by line: `iter_lines` would wait for 1,024 bytes."""
    while line := stream.readline(b"\n"):
        at = time.perf_counter()
        if line.startswith(b"data:"):
            yield line[5:].strip(), at


def _parse(dialect: Dialect, event: bytes) -> ResponseData:
    """Raises StreamError."""
    try:
        data = dialect.parse_event(json.loads(event))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise StreamError("invalid response") from None
    if data.error is not None:
        raise StreamError(data.error)
    return data


def _retry_after(response: Any) -> float:
    """Seconds; 1.0 if the header is missing or a date."""
    value = (response.headers or {}).get("retry-after", "")
    return float(value) if value.isdigit() else 1.0


def _ms(seconds: float) -> float:
    return seconds * 1e3


if __name__ == "__main__":
    # `locust --help` exits before Locust reads a locustfile, so it does not list these options.
    get_parser().print_help()
