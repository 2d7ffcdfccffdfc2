"""Locust against an LLM service: streams, with TTFT, TPOT and tokens beside the requests.

    locust -f perf/locustfile.py --host http://localhost:8000            # web UI at http://localhost:8089
    locust -f perf/locustfile.py --headless -u 8 -r 8 -t 60s             # without
    locust -f perf/locustfile.py --headless --step-users 4 --step-seconds 30 --steps 5
    python -m perf.locustfile                                            # its options

Its users are a closed loop: whoever waits for an answer asks for nothing, so a server that stalls is asked less. Locust
rounds percentiles (averages and totals are exact). `python -m perf.suite` has neither limit.
"""

# mypy: disable-error-code="misc, untyped-decorator"
# Locust is untyped.

from __future__ import annotations

import itertools
import json
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import get_parser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS

Json: TypeAlias = dict[str, Any]

WORDS = ("river", "stone", "lamp", "winter", "garden", "letter", "engine", "copper", "window", "silver", "market")

_users = itertools.count()


class StreamError(Exception):
    """What a stream said in place of its end, or that it had none."""


@dataclass(slots=True)
class Answer:
    """Instants of the monotonic clock; `tokens` as the server counted them, else one a frame."""

    first: float | None = None
    last: float = 0.0
    frames: int = 0
    counted: int | None = None
    ended: bool = False

    @property
    def tokens(self) -> int:
        return self.frames if self.counted is None else self.counted


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one API is asked, and what its frames say: `read` is told each, and tells whether it brought a token."""

    path: str
    body: Callable[[str, Namespace], Json]
    read: Callable[[Json, Answer], bool]


def _native_body(prompt: str, options: Namespace) -> Json:
    return {"prompt": prompt, "max_tokens": options.max_tokens, "include_text": False}


def _native_read(frame: Json, answer: Answer) -> bool:
    answer.ended = frame["finished"]
    if usage := frame.get("usage"):
        answer.counted = usage["completion_tokens"]
    return True


def _openai_body(prompt: str, options: Namespace) -> Json:
    said = {"prompt": prompt, "max_tokens": options.max_tokens, "stream": True}
    return said | {"stream_options": {"include_usage": True}}


def _openai_read(frame: Json, answer: Answer) -> bool:
    if usage := frame.get("usage"):
        answer.counted = usage["completion_tokens"]
    return bool(frame.get("choices"))


def _tgi_body(prompt: str, options: Namespace) -> Json:
    return {"inputs": prompt, "parameters": {"max_new_tokens": options.max_tokens, "details": True}}


def _tgi_read(frame: Json, answer: Answer) -> bool:
    answer.ended = frame.get("generated_text") is not None
    if details := frame.get("details"):
        answer.counted = details["generated_tokens"]
    return "token" in frame


DIALECTS = {
    "native": Dialect("/generate_stream", _native_body, _native_read),
    "openai": Dialect("/v1/completions", _openai_body, _openai_read),
    "tgi": Dialect("/generate_stream", _tgi_body, _tgi_read),
}


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    say = parser.add_argument
    say("--api", choices=sorted(DIALECTS), default="native", help="dialect to speak (default native)")
    say("--model", default="", help="`model` of the body; left out if it is empty")
    say("--prompt", default="", help="ask always this, which a prefix cache will know; else a new prompt each time")
    say("--prompt-words", type=int, default=40, metavar="N", help="length of new prompts (default 40)")
    say("--prompt-seed", type=int, default=7, metavar="N", help="which new prompts (default 7)")
    say("--max-tokens", type=int, default=64, metavar="N", help="length of answers (default 64)")
    say("--ignore-eos", action="store_true", help="answers of exactly --max-tokens, if the server knows ignore_eos")
    # What is in a group is not in the web UI's form, which comes too late for a load shape and is no place for a key.
    here = parser.add_argument_group("LLM options of the command line")
    here.add_argument("--api-key-file", type=Path, metavar="FILE", help="its content is sent as the bearer token")
    step = partial(here.add_argument, type=int, metavar="N")
    step("--step-users", default=0, help="so many users more each step, in place of -u and -r")
    step("--step-seconds", default=30, help="length of a step (default 30)")
    step("--steps", default=5, help="how many (default 5); then the test ends")


class Steps(LoadTestShape):
    """`abstract`, or Locust would take it unasked, and -u and -r would do nothing."""

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
            raise SystemExit("--step-users, --step-seconds and --steps are 1 or more")
        environment.shape_class = Steps(options)
        environment.shape_class.runner = environment.runner


class Reader(FastHttpUser):
    """Asks, reads to the end, asks again."""

    host = "http://localhost:8000"
    concurrency = 1
    network_timeout = 600.0

    def on_start(self) -> None:
        self._number = next(_users)
        self._asked = 0
        key = self.environment.parsed_options.api_key_file
        self._headers = {"Authorization": f"Bearer {key.read_text().strip()}"} if key else {}

    @task
    def generate(self) -> None:
        options = self.environment.parsed_options
        dialect = DIALECTS[options.api]
        body = dialect.body(self._prompt(options), options)
        body |= {"model": options.model} if options.model else {}
        body |= {"ignore_eos": True} if options.ignore_eos else {}
        started = time.perf_counter()
        with self.client.post(
            dialect.path, json=body, headers=self._headers, stream=True, catch_response=True
        ) as response:
            status = response.status_code
            if status == 200:
                self._read(response, dialect, started)
            elif status:
                # One kind whatever the server's sentence is: Locust counts failures by their text.
                response.failure(f"http {status}")
            # 0: nobody answered, and Locust tells why.
            response.request_meta["response_time"] = _ms(time.perf_counter() - started)
        if status in (0, 429, 503):
            time.sleep(_retry_after(response))  # gevent's: Locust patched it

    def _prompt(self, options: Namespace) -> str:
        """The first word differs, so that nothing is shared with any other prompt."""
        if options.prompt:
            return str(options.prompt)
        self._asked += 1
        worker = getattr(self.environment.runner, "worker_index", 0)
        seed = f"{options.prompt_seed}-{worker}-{self._number}-{self._asked}"
        drawn = random.Random(seed)
        return " ".join([f"{drawn.getrandbits(32):08x}", *drawn.choices(WORDS, k=options.prompt_words)])

    def _read(self, response: Any, dialect: Dialect, started: float) -> None:
        answer = Answer()
        try:
            for frame, at in _frames(response.stream, answer):
                if error := frame.get("error"):
                    raise StreamError(f"in band: {_kind(error, frame)}")
                if dialect.read(frame, answer):
                    answer.frames += 1
                    answer.first = at if answer.first is None else answer.first
                    answer.last = at
            if not answer.ended:
                raise StreamError("the stream was cut")
        except StreamError as error:
            response.failure(str(error))
        except FAILURE_EXCEPTIONS as error:
            response.failure(f"the stream was cut: {type(error).__name__}")
        else:
            self._tell(dialect.path, answer, started)

    def _tell(self, name: str, answer: Answer, started: float) -> None:
        if answer.first is not None:
            self._fire("TTFT", name, _ms(answer.first - started))
            if answer.tokens > 1 and answer.frames > 1:
                self._fire("TPOT", name, _ms(answer.last - answer.first) / (answer.tokens - 1))
        self._fire("tokens", name, answer.tokens)

    def _fire(self, kind: str, name: str, value: float) -> None:
        """Locust has one kind of number: the columns of `tokens` are tokens an answer, not ms."""
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=value, response_length=0, exception=None, context={}
        )


def _frames(stream: Any, answer: Answer) -> Iterator[tuple[Json, float]]:
    """Documents of `data:` lines, and when each was there. By line: `iter_lines` would wait for 1,024 bytes."""
    while line := stream.readline(b"\n"):
        at = time.perf_counter()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            answer.ended = True
            continue
        try:
            yield json.loads(data), at
        except ValueError:
            raise StreamError("a frame that is not JSON") from None


def _kind(error: object, frame: Json) -> object:
    if isinstance(error, dict):
        return error.get("code") or error.get("type") or error.get("message")
    return frame.get("error_type", error)


def _retry_after(response: Any) -> float:
    """Seconds; a date is not worth the code."""
    told = (response.headers or {}).get("retry-after", "")
    return float(told) if told.isdigit() else 1.0


def _ms(seconds: float) -> float:
    return seconds * 1e3


if __name__ == "__main__":
    # `locust --help` ends before Locust has read a file, and so without that file's options.
    get_parser().print_help()
