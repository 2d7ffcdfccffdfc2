"""What a run writes: `results.json`, one typed tree with a version and a JSON Schema.

Latencies are in milliseconds, durations in seconds, rates per second. `None` is what was not there to be measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")

Scenario: TypeAlias = Literal["single", "batch", "streaming", "concurrency", "rate", "batch-profile", "find-max"]
Count: TypeAlias = Annotated[int, Field(ge=0)]


class ResultsError(Exception):
    """A file that is no run of this suite; the sentence says what is wrong with it."""


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distribution(Tree):
    """Of one quantity, in ms; percentiles interpolate linearly between samples, as numpy's do by default."""

    count: Count
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Samples(Tree):
    """One entry a finished request of the measured window, in the order in which they were due."""

    repeat: list[int] = Field(description="Which of the repeats it belongs to, from 0.")
    due_s: list[float] = Field(description="When it was due, since the window opened.")
    ttft_ms: list[float | None] = Field(description="Due to first token; null for answers that came whole.")
    tpot_ms: list[float | None] = Field(description="(last - first token) / (tokens - 1); null below two tokens.")
    e2e_ms: list[float] = Field(description="Due to the end of the answer.")
    service_ms: list[float] = Field(description="Sent to the end of the answer.")
    longest_gap_ms: list[float | None] = Field(description="Between two chunks of its stream.")
    tokens: list[int] = Field(description="Tokens of the answer; of all answers of a batch.")


class Second(Tree):
    """One second of the window."""

    at_s: float
    tokens: float
    started: int
    in_flight: int


class Load(Tree):
    """What was asked of the server. Open: at instants of a schedule. Closed: as soon as a stream is free."""

    loop: Literal["open", "closed"]
    arrival: Literal["constant", "poisson", "gamma", "burst", "ramp", "closed", "trace"]
    rate: float | None = Field(default=None, description="Requests a second, of open loops.")
    concurrency: int | None = Field(default=None, description="Streams at a time, of closed loops.")
    batch_size: int = Field(default=1, description="Prompts a request.")
    streaming: bool = True


class Client(Tree):
    """Whether the client itself could carry the load."""

    cpu: float = Field(description="Share of one core that the client's process used.")
    schedule_delay_p50_ms: float = Field(description="Due to sent.")
    schedule_delay_p99_ms: float
    loop_lag_p99_ms: float = Field(description="By how much a timer of the client's event loop was late.")
    achieved_rate: float | None = Field(default=None, description="Started over due requests of an open loop's rate.")
    limited: list[str] = Field(
        description="Why these numbers are the client's and not the server's; empty: they count."
    )


class Goodput(Tree):
    """Requests that met all of the SLO's bounds, failed ones included among those that did not."""

    slo: str
    requests_per_s: float
    share: float


class Resources(Tree):
    """Of the machine that the client runs on, warm-up included; the server's as well if that is the same."""

    cpu_percent: float
    memory_mib: float
    gpu_percent: float | None = None
    gpu_memory_mib: float | None = None


class Stage(Tree):
    """One load level of a scenario."""

    scenario: Scenario
    name: str = Field(description="Unique in its scenario, as `8 streams`.")
    load: Load
    repeats: Count
    warmup_requests: Count
    steady: bool | None = Field(description="Whether latency had settled when the warm-up ended; null: there was none.")
    window_s: float = Field(description="All repeats together, warm-up and drain excluded.")
    requests: Count = Field(description="Due in the window.")
    finished: Count
    errors: dict[str, int] = Field(description="Failed requests of the window by kind.")
    tokens: Count = Field(description="Of the finished requests' answers.")
    prompt_tokens: Count
    tokens_per_s: float = Field(description="Tokens that arrived within the window, whoever's.")
    tokens_per_s_by_repeat: list[float] = []
    requests_per_s: float = Field(description="Requests that finished within the window.")
    tokens_per_chunk: float | None = None
    ttft_ms: Distribution | None = None
    ttft_service_ms: Distribution | None = Field(default=None, description="As ttft, from the instant it was sent.")
    tpot_ms: Distribution | None = None
    itl_ms: Distribution | None = Field(default=None, description="All gaps between chunks, pooled.")
    itl_quantiles_ms: list[float] = Field(default=[], description="At 0, 1, ... 100 percent.")
    e2e_ms: Distribution | None = None
    e2e_service_ms: Distribution | None = None
    efficiency: float | None = Field(
        default=None,
        description="Concurrency: tok/s over those of the fewest streams, by so many times the streams. "
        "Batch: tok/s over those of the smallest batch.",
    )
    goodput: Goodput | None = None
    missed: list[str] = Field(default=[], description="Bounds of the SLO that did not hold, in words.")
    client: Client
    resources: Resources | None = None
    timeline: list[Second] = []
    samples: Samples

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


class Tokens(Tree):
    """What both sides counted over one scenario, warm-up and drain included."""

    scenario: Scenario
    client: Count
    server: Count | None = Field(description="None: the server exposes no counter that is known here.")
    client_requests: Count
    server_requests: Count | None
    server_metrics: dict[str, float] = Field(
        default={}, description="Differences of the server's counters and ratios of them."
    )

    @property
    def difference(self) -> int | None:
        return None if self.server is None else self.server - self.client


class Probe(Tree):
    at: float
    met: bool
    why: str
    measured: dict[str, float] = {}


class FindMax(Tree):
    """The highest load that meets the SLO, between a probe that met it and one that did not."""

    of: Literal["rate", "concurrency"]
    slo: str
    best: float | None = Field(description="None: not even the lowest load met it.")
    broke_at: float | None = Field(description="The lowest load that did not; None: the search's upper end met it.")
    limit: Literal["latency", "errors", "queue", "client", "none"]
    probes: list[Probe]


class BatchAdvice(Tree):
    """Which `max_batch_size` to choose, and why."""

    recommended: int
    reason: str


class Cost(Tree):
    instance_type: str
    provider: str
    usd_per_hour: float
    as_of: str
    tokens_per_s: float
    stage: str
    usd_per_million_output_tokens: float
    usd_per_thousand_requests: float


class Target(Tree):
    url: str
    api: Literal["native", "openai", "tgi"]
    model: str | None
    server: str = Field(description="As far as it says what it is.")
    on_this_machine: bool
    fixed_length: bool = Field(description="Whether it was told to ignore the end of text, so that lengths are equal.")


class Machine(Tree):
    processor: str
    cores: int
    memory_gib: float
    gpus: list[str]
    system: str
    python: str


class Verdict(Tree):
    """What a person is to know and to do."""

    sentences: list[str]
    recommendations: list[str]
    exit_code: int
    reasons: list[str] = Field(default=[], description="Of an exit code other than 0.")


class Run(Tree):
    schema_version: Literal[1] = 1
    tool: str
    started_at: str = Field(description="ISO 8601, UTC.")
    seconds: float
    command: list[str] = Field(description="As it was given; no secret is ever on it.")
    commit: str | None = Field(description="Of the working copy that the suite ran from.")
    settings: dict[str, Any]
    target: Target
    machine: Machine
    slo: str | None
    stages: list[Stage]
    skipped: dict[str, str] = Field(default={}, description="Scenarios that could not be run, and why.")
    tokens: list[Tokens] = []
    find_max: FindMax | None = None
    batch_advice: BatchAdvice | None = None
    cost: Cost | None = None
    verdict: Verdict

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ResultsError."""
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise ResultsError(f"{path} is not JSON; give a results.json that perf.suite wrote") from None
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ResultsError(f"{path} has schema_version {version!r}, and this suite reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise ResultsError(f"{path}: {where}: {first['msg']}") from None

    def stage(self, scenario: str, name: str) -> Stage | None:
        return next((stage for stage in self.stages if (stage.scenario, stage.name) == (scenario, name)), None)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of results.json; SCHEMA_FILE holds it, and a test that it is this."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Run.model_json_schema(mode="serialization")}
