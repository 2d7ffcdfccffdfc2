"""The file `results.json`: one typed tree with a version and a JSON Schema.

Latencies are in milliseconds, durations in seconds, rates per second. `None` is a value that was not measured.
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
    """The file is not a run of this suite; the message gives the reason."""


class ResultModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distribution(ResultModel):
    """Statistics of one metric in ms; percentiles interpolate linearly between samples, the default of numpy."""

    count: Count
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Samples(ResultModel):
    """One entry per finished request of the measurement window, in the order of the due times."""

    repeat: list[int] = Field(description="Number of the repeat, from 0.")
    due_s: list[float] = Field(description="Due time, from the start of the window.")
    ttft_ms: list[float | None] = Field(description="From due to first token; null without streaming.")
    tpot_ms: list[float | None] = Field(description="(last - first token) / (tokens - 1); null below two tokens.")
    e2e_ms: list[float] = Field(description="From due to the end of the response.")
    service_ms: list[float] = Field(description="From sent to the end of the response.")
    longest_gap_ms: list[float | None] = Field(description="Longest time between two chunks of the stream.")
    tokens: list[int] = Field(description="Tokens of the response; of all responses of a batch.")


class Second(ResultModel):
    """Totals of one second of the window."""

    at_s: float
    tokens: float
    started: int
    in_flight: int


class Load(ResultModel):
    """The load. Open loop: requests at scheduled times. Closed loop: each stream sends after its response."""

    loop: Literal["open", "closed"]
    arrival: Literal["constant", "poisson", "gamma", "burst", "ramp", "closed", "trace"]
    rate: float | None = Field(default=None, description="Requests per second, of open loops.")
    concurrency: int | None = Field(default=None, description="Concurrent streams, of closed loops.")
    batch_size: int = Field(default=1, description="Prompts per request.")
    streaming: bool = True


class Client(ResultModel):
    """Whether the client kept up with the load."""

    cpu: float = Field(description="Share of one core that the client process used.")
    schedule_delay_p50_ms: float = Field(description="From due to sent.")
    schedule_delay_p99_ms: float
    loop_lag_p99_ms: float = Field(description="Lateness of timers of the client's event loop.")
    achieved_rate: float | None = Field(default=None, description="Sent rate over requested rate, of open loops.")
    limited: list[str] = Field(
        description="Why the metrics describe the client and not the server; empty: they describe the server."
    )


class Goodput(ResultModel):
    """Requests that met all bounds of the SLO; failed requests did not."""

    slo: str
    requests_per_s: float
    share: float


class Resources(ResultModel):
    """Resource use of the client's machine, warm-up included; includes the server if it runs there."""

    cpu_percent: float
    memory_mib: float
    gpu_percent: float | None = None
    gpu_memory_mib: float | None = None


class Stage(ResultModel):
    """One load level of a scenario."""

    scenario: Scenario
    name: str = Field(description="Unique in its scenario, such as `8 streams`.")
    load: Load
    repeats: Count
    warmup_requests: Count
    steady: bool | None = Field(
        description="Whether latency was steady at the end of the warm-up; null: there was no warm-up."
    )
    window_s: float = Field(description="Sum over all repeats, without warm-up and cool-down.")
    requests: Count = Field(description="Requests that were due in the window.")
    finished: Count
    errors: dict[str, int] = Field(description="Failed requests of the window, by kind.")
    tokens: Count = Field(description="Tokens of the finished responses.")
    prompt_tokens: Count
    tokens_per_s: float = Field(description="Tokens of all requests that arrived within the window.")
    tokens_per_s_by_repeat: list[float] = []
    requests_per_s: float = Field(description="Requests that finished within the window.")
    tokens_per_chunk: float | None = None
    ttft_ms: Distribution | None = None
    ttft_service_ms: Distribution | None = Field(default=None, description="TTFT counted from sending.")
    tpot_ms: Distribution | None = None
    itl_ms: Distribution | None = Field(default=None, description="All gaps between chunks of all requests.")
    itl_quantiles_ms: list[float] = Field(default=[], description="ITL at 0, 1, ... 100 percent.")
    e2e_ms: Distribution | None = None
    e2e_service_ms: Distribution | None = None
    efficiency: float | None = Field(
        default=None,
        description="Concurrency: throughput relative to the fewest streams, divided by the ratio of the streams. "
        "Batch: throughput relative to the smallest batch.",
    )
    goodput: Goodput | None = None
    missed: list[str] = Field(default=[], description="A sentence for each bound of the SLO that was not met.")
    client: Client
    resources: Resources | None = None
    timeline: list[Second] = []
    samples: Samples

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


class Tokens(ResultModel):
    """Tokens and requests of one scenario as client and server counted them, warm-up and cool-down included."""

    scenario: Scenario
    client: Count
    server: Count | None = Field(description="None: the server has no known counter.")
    client_requests: Count
    server_requests: Count | None
    server_metrics: dict[str, float] = Field(
        default={}, description="Differences of the server's counters, and their ratios."
    )

    @property
    def difference(self) -> int | None:
        return None if self.server is None else self.server - self.client


class Probe(ResultModel):
    at: float
    met: bool
    why: str
    measured: dict[str, float] = {}


class FindMax(ResultModel):
    """The highest load that meets the SLO, between a probe that met it and one that did not."""

    of: Literal["rate", "concurrency"]
    slo: str
    best: float | None = Field(description="None: the lowest load did not meet it.")
    broke_at: float | None = Field(
        description="The lowest load that did not meet it; None: the upper end of the search met it."
    )
    limit: Literal["latency", "errors", "queue", "client", "none"]
    probes: list[Probe]


class BatchAdvice(ResultModel):
    """The recommended `max_batch_size` and the reason."""

    recommended: int
    reason: str


class Cost(ResultModel):
    instance_type: str
    provider: str
    usd_per_hour: float
    as_of: str
    tokens_per_s: float
    stage: str
    usd_per_million_output_tokens: float
    usd_per_thousand_requests: float


class Target(ResultModel):
    url: str
    api: Literal["native", "openai", "tgi"]
    model: str | None
    server: str = Field(description="Server software, identified by its metrics.")
    on_this_machine: bool
    quantization: str | None = Field(
        default=None, description="Quantization of the weights, as the server reports it at /info; None: unknown."
    )
    fixed_length: bool = Field(
        description="Whether requests set ignore_eos, so that all responses have the same length."
    )


class Machine(ResultModel):
    processor: str
    cores: int
    memory_gib: float
    gpus: list[str]
    system: str
    python: str


class Verdict(ResultModel):
    """Conclusions, recommendations and exit code."""

    sentences: list[str]
    recommendations: list[str]
    exit_code: int
    reasons: list[str] = Field(default=[], description="Reasons for an exit code other than 0.")


class Run(ResultModel):
    schema_version: Literal[1] = 1
    tool: str
    started_at: str = Field(description="ISO 8601, UTC.")
    seconds: float
    command: list[str] = Field(description="The command line; it never contains a secret.")
    commit: str | None = Field(description="Commit of the suite's working copy.")
    settings: dict[str, Any]
    target: Target
    machine: Machine
    slo: str | None
    stages: list[Stage]
    skipped: dict[str, str] = Field(default={}, description="Scenarios that were not run, with the reason.")
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
            raise ResultsError(f"{path} is not JSON; give a results.json of perf.suite") from None
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ResultsError(f"{path} has schema_version {version!r}, but this version reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise ResultsError(f"{path}: {where}: {first['msg']}") from None

    def stage(self, scenario: str, name: str) -> Stage | None:
        return next((stage for stage in self.stages if (stage.scenario, stage.name) == (scenario, name)), None)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of results.json; a test checks that SCHEMA_FILE is up to date."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Run.model_json_schema(mode="serialization")}
