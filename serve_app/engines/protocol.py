"""The ReplicaEngine protocol: the engine of one replica, as the deployment uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from serve_app.core.queries import A, Query
from serve_app.engines.stream import TokenStream
from serve_app.errors import ServeAppError


class EngineStalled(Exception):
    """The engine cannot serve any more; the replica should be replaced."""


class Cause(StrEnum):
    """Why the model failed. `memory`: an allocation failed; `not_finite`: NaN or infinite numbers; `error`: another
    exception."""

    MEMORY = "memory"
    NOT_FINITE = "not_finite"
    ERROR = "error"


class Work(NamedTuple):
    """A forward pass that runs now: its number, and the time in seconds after which it has hung."""

    number: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine. Counters count from its start.

    `slots` is the largest number of sequences that run at a time, `kv_tokens` the number of tokens that the KV cache
    can hold. `prompt_tokens` were looked up in the prefix cache, and `cached_tokens` of them found. `drafted` tokens
    were proposed by speculative decoding, and `accepted` of them kept. A step is one forward pass, `rows` the number of
    tokens that all steps computed.
    """

    running: int
    waiting: int
    slots: int
    tokens_held: int
    kv_tokens: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    drafted: int
    accepted: int
    generated_tokens: int
    steps: int
    rows: int


@dataclass(frozen=True, slots=True)
class StepStats(EngineStats):
    """A snapshot of an engine that runs its steps itself.

    `decode_rows` of the rows were computed for decoding sequences. `busy_s` is the time of all steps from plan to
    commit, of which `planning_s` passed before the model ran. `delivery_s` is the time after the steps in which their
    results were sent to the streams. `failed_passes` are the forward passes and cache operations that failed, and
    `failed_sequences` the sequences that ended because the model could not compute them, both by cause.
    """

    decode_rows: int
    busy_s: float
    planning_s: float
    delivery_s: float
    failed_passes: Mapping[Cause, int]
    failed_sequences: Mapping[Cause, int]


class ReplicaEngine(Protocol):
    """Computes the answers of one model. All methods but `start` may be called once `start` has returned.

    `stop` may be called at any time. `admit` is called on one thread, `answer` on several; the streams belong to the
    event loop.
    """

    @property
    def kind(self) -> str:
        """How steps are computed, for example `fused`, `transformers`, `toy` or `vllm`."""
        ...

    @property
    def quantization(self) -> str:
        """The quantization of the weights."""
        ...

    def start(self) -> None:
        """Load the model. Returns when the engine is ready; raises what loading raised."""
        ...

    def stop(self, timeout_s: float = 30) -> None:
        """End the engine and free its memory. Unfinished requests end with NotReady."""
        ...

    def acquire_adapter(self, stream: TokenStream) -> ServeAppError | None:
        """Load the LoRA adapter of the stream's request, if it has one, and keep it until the stream is closed.

        Call it before `admit`, on any thread. Returns why the adapter cannot be used.
        """
        ...

    def admit(self, streams: Seq[TokenStream]) -> list[ServeAppError | None]:
        """Tokenize the prompts of several streams together and queue them; the reason of refusal of each, or None.

        An admitted stream receives tokens or an error later. A fault in one request fails only that request, with
        InternalError; only KeyboardInterrupt and SystemExit are raised.
        """
        ...

    def answer(self, query: Query[A]) -> A | ServeAppError:
        """The result of a query, or an error. Takes no step; raises only KeyboardInterrupt and SystemExit."""
        ...

    def check(self) -> None:
        """Raises EngineStalled if the engine cannot serve any more."""
        ...

    def step_age(self) -> float:
        """Seconds since the current step began; 0 between steps."""
        ...

    def stats(self) -> EngineStats:
        """The state and the counters of the engine."""
        ...
