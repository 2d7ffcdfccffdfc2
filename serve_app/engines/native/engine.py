"""The engine's thread: it owns the model and advances all sequences together, one step at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence as Seq
from dataclasses import asdict
from functools import partial
from typing import cast

from serve_app.config import ConfigError, Lora, NativeOptions
from serve_app.core.queries import A, GetModelInfo, LoadAdapter, ModelInfo, Query
from serve_app.core.requests import Adapter
from serve_app.engines.adapters import AdapterCache
from serve_app.engines.admission import UNREADABLE, Prepared, guarded, prepare
from serve_app.engines.ending import stopping_error
from serve_app.engines.native.failure import Failure, failure
from serve_app.engines.native.isolation import StepResult, compute
from serve_app.engines.native.kv_cache import KVCache
from serve_app.engines.native.scheduler import Result, Scheduler
from serve_app.engines.native.sequence import Runner, Sequence, Step
from serve_app.engines.native.step_time import StepTimeModel
from serve_app.engines.protocol import Cause, EngineStalled, StepStats, Work
from serve_app.engines.stream import Embedding, Token, TokenStream, wake_all
from serve_app.engines.text.queries import answer
from serve_app.errors import ServeAppError

logger = logging.getLogger(__name__)

FAILURES_BEFORE_UNHEALTHY = 3


class NativeEngine:
    """Continuous batching over one Runner.

    The engine's own thread calls `make_runner`, because torch's thread pools belong to the thread that first used
    them, and `watch`, with every step that was computed and its seconds. All other methods may be called from any
    thread once `start` has returned; `stop` may be called at any time.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        config: NativeOptions,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[Step, float], None] | None = None,
        lora: Lora | None = None,
    ) -> None:
        self._make_runner = make_runner
        self._config = config
        self._clock = clock
        self._watch = watch
        self._lora = lora or Lora()
        self._new: list[Sequence] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None
        self._step_started: float | None = None
        self._pass: tuple[int, int] | None = None  # the number of the current forward pass, and its rows
        self._passes = 0
        self._step_times = StepTimeModel()
        self._failures_in_a_row = 0
        self._counts = dict.fromkeys(("steps", "rows", "decode_rows", "generated_tokens"), 0)
        self._failed_passes, self._failed_sequences = Counter[Cause](), Counter[Cause]()
        self._seconds = dict.fromkeys(("busy_s", "planning_s", "delivery_s"), 0.0)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model and start the thread. Returns when the engine is ready; raises what loading raised."""
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error
        self._adapters = AdapterCache(self._lora.max_loaded, self._runner.load_adapter)
        if fault := self._adapters.preload([Adapter(**one.model_dump()) for one in self._lora.adapters]):
            raise ConfigError(fault)

    def stop(self, timeout_s: float = 30) -> None:
        """End the thread after the current step. Unfinished requests end with NotReady."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def acquire_adapter(self, stream: TokenStream) -> ServeAppError | None:
        return self._adapters.acquire_for(stream)

    def admit(self, streams: Seq[TokenStream]) -> list[ServeAppError | None]:
        """Tokenize the prompts of several streams together and queue them; the reason of refusal of each, or None.

        An admitted stream receives tokens or an error later. A fault in one request fails only that request, with
        InternalError; only KeyboardInterrupt and SystemExit are raised.
        """
        runner = self._runner
        prepared = prepare(streams, runner.text, runner.context, self._clock())
        made = [self._sequence(one) if isinstance(one, Prepared) else one for one in prepared]
        outcomes = [one if isinstance(one, ServeAppError) else None for one in made]
        with self._changed:
            if self._stopping:
                return [outcome or stopping_error() for outcome in outcomes]
            self._new.extend(one for one in made if isinstance(one, Sequence))
            self._changed.notify()
        return outcomes

    def answer(self, query: Query[A]) -> A | ServeAppError:
        """The result of a query, or an error. Takes no step; raises only KeyboardInterrupt and SystemExit."""
        result = guarded(partial(self._answer, query), f"query {type(query).__name__}", "the query failed")
        return cast("A | ServeAppError", result)

    def check(self) -> None:
        """Raises EngineStalled if the last steps all failed or the thread has ended."""
        if not self._thread.is_alive():
            raise EngineStalled("the engine's thread has ended")
        if self._failures_in_a_row >= FAILURES_BEFORE_UNHEALTHY:
            raise EngineStalled(f"{self._failures_in_a_row} steps failed in a row")

    def step_age(self) -> float:
        """Seconds since the current step began; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else self._clock() - started

    def work(self) -> Work | None:
        """The forward pass that runs now; None between steps."""
        current = self._pass
        if current is None:
            return None
        number, rows = current
        return Work(number, self._step_times.limit(rows, self._config.step_timeout_s))

    @property
    def kind(self) -> str:
        """How steps are computed: `fused`, `transformers` or `toy`."""
        return self._runner.kind

    @property
    def quantization(self) -> str:
        """The quantization of the weights: `none`, `int8` or `int4`."""
        return self._runner.quantization

    def stats(self) -> StepStats:
        scheduler, runner = self._scheduler, self._runner
        return StepStats(
            running=scheduler.running,
            waiting=scheduler.waiting + len(self._new),
            slots=runner.slots,
            tokens_held=scheduler.tokens_held,
            kv_tokens=runner.kv_tokens,
            **asdict(scheduler.counts),
            busy_s=self._seconds["busy_s"],
            planning_s=self._seconds["planning_s"],
            delivery_s=self._seconds["delivery_s"],
            failed_passes=dict(self._failed_passes),
            failed_sequences=dict(self._failed_sequences),
            **self._counts,
        )

    def _sequence(self, one: Prepared) -> Sequence | ServeAppError:
        return guarded(partial(self._make_sequence, one), f"admission of request {one.stream.request.id}", UNREADABLE)

    def _make_sequence(self, one: Prepared) -> Sequence | ServeAppError:
        text, context = self._runner.text, self._runner.context
        sequence = Sequence(one.stream, one.prompt, text.end_ids, context, one.plan.constraint)
        return sequence.ending.replay(one.stream.request.resumed) or sequence

    def _answer(self, query: Query[A]) -> object:
        if isinstance(query, LoadAdapter):
            return self._adapters.reload(query.adapter)
        if isinstance(query, GetModelInfo):
            runner, text = self._runner, self._runner.text
            return ModelInfo(
                runner.context,
                text.vocabulary,
                text.special_ids,
                quantization=runner.quantization,
                dtype=runner.dtype_name,
            )
        return answer(query, self._runner.text)

    def _main(self) -> None:
        try:
            self._runner = self._make_runner()
            self._scheduler = _scheduler(self._runner, self._config, self._step_times)
        except BaseException as error:  # noqa: BLE001 - start() raises it to its caller
            self._load_error = error
            return
        finally:
            self._loaded.set()
        try:
            while self._wait_for_work():
                self._step()
        finally:
            self._end()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._stopping and not self._new and self._scheduler.idle:
                self._scheduler.check_slots()
                self._changed.wait()
            new, self._new = self._new, []
            stopping = self._stopping
        refused = []
        for sequence in new:
            refusal = self._scheduler.add(sequence)
            if refusal is not None:
                refused.append((sequence, refusal))
        self._fail_streams(refused)
        return not stopping

    def _step(self) -> None:
        """Remove ended sequences, plan a step, compute it, commit it and send its results to the streams."""
        now = self._clock()
        self._step_started = now
        self._begin_pass(0)
        try:
            self._fail_streams(self._scheduler.remove_ended(now))
            step = self._scheduler.plan(now)
            if step.advances:
                self._compute(step, now)
        finally:
            self._step_started = self._pass = None

    def _compute(self, step: Step, began: float) -> None:
        planned = self._clock()
        computed = compute(self._runner, step, self._begin_pass)
        done = self._clock()
        results = self._scheduler.commit(computed.step, computed.outcomes, done)
        if computed.failures:
            results += self._handle_failures(computed)
        self._deliver(results)
        if computed.step.advances:
            generated = sum(isinstance(result, Token) for _, result in results)
            self._count(computed.step, generated, done - began, undisturbed=not computed.failures)
        self._seconds["planning_s"] += planned - began
        self._seconds["delivery_s"] += self._clock() - done

    def _begin_pass(self, rows: int) -> None:
        self._passes += 1
        self._pass = self._passes, rows

    def _handle_failures(self, computed: StepResult) -> list[tuple[Sequence, Result]]:
        """Remove the sequences that cannot be computed; their failures."""
        self._failed_passes += computed.failures
        self._failures_in_a_row = 0 if computed.step.advances else self._failures_in_a_row + 1
        self._scheduler.undo(computed.undone)
        self._scheduler.fail([sequence for sequence, _ in computed.failed])
        return [(sequence, failure(cause)) for sequence, cause in computed.failed]

    def _deliver(self, results: Seq[tuple[Sequence, Result]]) -> None:
        for sequence, result in results:
            if isinstance(result, Token | Embedding):
                sequence.stream.put(result)
            elif isinstance(result, Failure):
                self._failed_sequences[result.cause] += 1
                sequence.stream.fail(result.error)
            else:
                sequence.stream.fail(result)
        wake_all(sequence.stream for sequence, _ in results)

    def _count(self, step: Step, generated: int, seconds: float, undisturbed: bool) -> None:
        """Count a step that was computed, at least in part. The time of an `undisturbed` one is learned."""
        self._failures_in_a_row = 0
        if undisturbed:
            self._scheduler.record(step, seconds)
        self._counts["steps"] += 1
        self._counts["rows"] += step.rows
        self._counts["decode_rows"] += sum(advance.rows for advance in step.advances if advance.count == 1)
        self._counts["generated_tokens"] += generated
        self._seconds["busy_s"] += seconds
        if self._watch is not None:
            self._watch(step, seconds)

    def _fail_streams(self, ended: list[tuple[Sequence, ServeAppError]]) -> None:
        for sequence, error in ended:
            sequence.stream.fail(error)
        wake_all(sequence.stream for sequence, _ in ended)

    def _end(self) -> None:
        with self._changed:
            self._stopping = True
            new, self._new = self._new, []
        self._fail_streams([(sequence, stopping_error()) for sequence in (*new, *self._scheduler.drain())])


def _scheduler(runner: Runner, config: NativeOptions, step_times: StepTimeModel) -> Scheduler:
    return Scheduler(
        KVCache(runner.slots, runner.kv_tokens),
        config.max_step_tokens,
        config.max_waiting,
        step_times,
        config.draft_tokens,
        config.prefix_cache,
    )
