"""The loop: one thread owns the model and takes all sequences one step further at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import asdict, dataclass
from math import isfinite
from typing import cast

from serve_app.config import Engine as EngineConfig
from serve_app.core.queries import A, Detokenize, GetModelInfo, ModelInfo, Query, Tokenize
from serve_app.engines.native.kv_cache import KVCache
from serve_app.engines.native.scheduler import Scheduler
from serve_app.engines.native.sequence import Runner, Sequence, Step
from serve_app.engines.native.step_time import StepTimeModel
from serve_app.engines.native.stream import Embedded, TokenStream, wake_all
from serve_app.engines.text.prompt_details import shown
from serve_app.errors import InternalError, InvalidRequest, NotReady, PromptTooLong, ServeAppError

logger = logging.getLogger(__name__)

FAILURES_BEFORE_UNHEALTHY = 3
# Names of tokens and numbers that one request may be told of its prompt.
MOST_TOLD = 65_536


class EngineStalled(Exception):
    """The engine cannot serve any more; the replica should be replaced."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One look at the engine. Counters count from its start.

    `busy_s` is the time of steps, from plan to commit; `planning_s` of it went before the model, and `telling_s` was
    spent after it, on taking tokens in and handing them out.
    """

    running: int
    waiting: int
    slots: int
    tokens_held: int
    arena_tokens: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    drafted: int
    accepted: int
    steps: int
    rows: int
    decode_rows: int
    generated_tokens: int
    busy_s: float
    planning_s: float
    telling_s: float
    failed_steps: int


class Engine:
    """Continuous batching over one Runner.

    `make_runner` is called on the engine's own thread, because torch's thread pools belong to the
    thread that first used them, and so is `watch`, with every step that succeeded and its seconds. Everything else may
    be called from any thread, once `start` has returned; `stop` at any time.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[Step, float], None] | None = None,
    ) -> None:
        self._make_runner = make_runner
        self._config = config
        self._clock = clock
        self._watch = watch
        self._inbox: list[Sequence] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None
        self._step_started: float | None = None
        self._failures_in_a_row = 0
        self._counts = dict.fromkeys(("steps", "rows", "decode_rows", "generated_tokens", "failed_steps"), 0)
        self._seconds = dict.fromkeys(("busy_s", "planning_s", "telling_s"), 0.0)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model and start the loop. Returns when it can answer; raises what loading raised."""
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def stop(self, timeout_s: float = 30) -> None:
        """End the loop after the step under way; what is unfinished gets an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def admit(self, streams: Seq[TokenStream]) -> list[ServeAppError | None]:
        """Tokenise the prompts of several streams together and queue them: one outcome each, never raises.

        None is success: tokens, or an error, will arrive on the stream.
        """
        try:
            return self._admit(streams)
        except Exception:
            logger.exception("admission failed")
            return [InternalError("the request could not be read") for _ in streams]

    def answer(self, question: Query[A]) -> A | ServeAppError:
        """What the question's class promises, or why it cannot be had. Takes no step; never raises."""
        try:
            return cast("A | ServeAppError", self._answer(question))
        except Exception:
            logger.exception("the question %s failed", type(question).__name__)
            return InternalError("the question could not be answered")

    def check(self) -> None:
        """Raises EngineStalled when steps fail one after another or the thread has ended."""
        if not self._thread.is_alive():
            raise EngineStalled("the engine's thread has ended")
        if self._failures_in_a_row >= FAILURES_BEFORE_UNHEALTHY:
            raise EngineStalled(f"{self._failures_in_a_row} steps failed in a row")

    def step_age(self) -> float:
        """Seconds since the step under way began; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else self._clock() - started

    @property
    def kind(self) -> str:
        """How steps run: `lean`, `packed` or `toy`."""
        return self._runner.kind

    def stats(self) -> EngineStats:
        scheduler, runner = self._scheduler, self._runner
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting + len(self._inbox),
            slots=runner.slots,
            tokens_held=scheduler.tokens_held,
            arena_tokens=runner.kv_tokens,
            **asdict(scheduler.counts),
            busy_s=self._seconds["busy_s"],
            planning_s=self._seconds["planning_s"],
            telling_s=self._seconds["telling_s"],
            **self._counts,
        )

    def _answer(self, question: Query[A]) -> object:
        text = self._runner.text
        match question:
            case Tokenize(prompt, special_tokens):
                return text.tokenize(prompt, special_tokens)
            case Detokenize(token_ids, skip_special_tokens):
                return text.detokenize(token_ids, skip_special_tokens)
            case GetModelInfo():
                return ModelInfo(self._runner.context, text.vocabulary, text.special_ids, text.tools)
        raise TypeError(f"{question!r} is no question to a model")

    def _admit(self, streams: Seq[TokenStream]) -> list[ServeAppError | None]:
        encoded = self._runner.text.encode([stream.request.prompt for stream in streams])
        made = [
            ids if isinstance(ids, ServeAppError) else self._sequence(stream, ids)
            for stream, ids in zip(streams, encoded, strict=True)
        ]
        outcomes = [one if isinstance(one, ServeAppError) else None for one in made]
        arrivals = [one for one in made if isinstance(one, Sequence)]
        with self._changed:
            if self._stopping:
                return [outcome or NotReady("this replica is shutting down", retry_after_s=1) for outcome in outcomes]
            self._inbox.extend(arrivals)
            self._changed.notify()
        return outcomes

    def _sequence(self, stream: TokenStream, ids: list[int]) -> Sequence | ServeAppError:
        """A sequence for a prompt, its stream opened; or why there can be none."""
        text, context, params = self._runner.text, self._runner.context, stream.request.params
        keep = stream.request.truncate_prompt_tokens
        if keep is not None:
            if keep < 1 and keep != -1:
                message = "truncate_prompt_tokens is at least 1, or -1 for as many as the model takes"
                return InvalidRequest(message, param="truncate_prompt_tokens")
            ids = ids[-(context - 1 if keep == -1 else keep) :]
        refusal = (
            _too_long(len(ids), context)
            or _wrong_bias(params.logit_bias, text.vocabulary)
            or _tells_too_much(len(ids), params.prompt_logprobs)
        )
        if refusal is not None:
            return refusal
        prompt = shown(text, stream.request, ids) if stream.request.prompt_details else None
        if isinstance(prompt, ServeAppError):
            return prompt
        constraint = None if params.grammar is None else text.constraint(params.grammar, params.ignore_eos)
        if isinstance(constraint, ServeAppError):
            return constraint
        stream.open(len(ids), text.decoder(ids, params.skip_special_tokens), prompt)
        return Sequence(stream, ids, text.end_ids, context, constraint)

    def _main(self) -> None:
        try:
            self._runner = self._make_runner()
            self._scheduler = _scheduler(self._runner, self._config)
        except BaseException as error:  # noqa: BLE001 - handed to start(), which raises it to the caller
            self._load_error = error
            return
        finally:
            self._loaded.set()
        try:
            while self._wait_for_work():
                self._turn()
        finally:
            self._end()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._stopping and not self._inbox and self._scheduler.idle:
                self._scheduler.check()
                self._changed.wait()
            arrivals, self._inbox = self._inbox, []
            stopping = self._stopping
        refused = []
        for sequence in arrivals:
            refusal = self._scheduler.add(sequence)
            if refusal is not None:
                refused.append((sequence, refusal))
        self._tell(refused)
        return not stopping

    def _turn(self) -> None:
        """Let go of who left, plan, run, commit, tell."""
        now = self._clock()
        self._tell(self._scheduler.sweep(now))
        step = self._scheduler.plan(now)
        if not step.advances:
            return
        self._step_started = now
        planned = self._clock()
        try:
            outcomes = self._runner.run(step)
            done = self._clock()
            news = self._scheduler.commit(step, outcomes, done)
        except Exception:
            logger.exception("step of %d rows failed", step.rows)
            self._fail(step)
            return
        finally:
            self._step_started = None
        for sequence, told in news:
            if isinstance(told, ServeAppError):
                sequence.stream.fail(told)
            else:
                sequence.stream.put(told)
        wake_all(sequence.stream for sequence, _ in news)
        self._count(step, sum(not isinstance(told, Embedded) for _, told in news), done - now)
        self._seconds["planning_s"] += planned - now
        self._seconds["telling_s"] += self._clock() - done

    def _fail(self, step: Step) -> None:
        self._failures_in_a_row += 1
        self._counts["failed_steps"] += 1
        lost = self._scheduler.fail(step)
        self._tell([(s, InternalError("the model failed on this step; the request was ended")) for s in lost])

    def _count(self, step: Step, generated: int, seconds: float) -> None:
        self._failures_in_a_row = 0
        self._scheduler.record(step, seconds)
        self._counts["steps"] += 1
        self._counts["rows"] += step.rows
        self._counts["decode_rows"] += sum(advance.rows for advance in step.advances if advance.count == 1)
        self._counts["generated_tokens"] += generated
        self._seconds["busy_s"] += seconds
        if self._watch is not None:
            self._watch(step, seconds)

    def _tell(self, ended: list[tuple[Sequence, ServeAppError]]) -> None:
        for sequence, error in ended:
            sequence.stream.fail(error)
        wake_all(sequence.stream for sequence, _ in ended)

    def _end(self) -> None:
        with self._changed:
            self._stopping = True
            left, self._inbox = self._inbox, []
        error = NotReady("this replica is shutting down; send the request again", retry_after_s=1)
        self._tell([(sequence, error) for sequence in (*left, *self._scheduler.drain())])


def _scheduler(runner: Runner, config: EngineConfig) -> Scheduler:
    arena = KVCache(runner.slots, runner.kv_tokens)
    return Scheduler(
        arena, config.max_step_tokens, config.max_waiting, StepTimeModel(), config.draft_tokens, config.prefix_cache
    )


def _wrong_bias(biases: Seq[tuple[int, float]], vocabulary: int) -> ServeAppError | None:
    for token, bias in biases:
        if not 0 <= token < vocabulary:
            return InvalidRequest(f"token id {token} is outside 0 to {vocabulary - 1}", param="logit_bias")
        if not isfinite(bias):
            return InvalidRequest(f"the bias of token {token} is not a finite number", param="logit_bias")
    return None


def _tells_too_much(tokens: int, alternatives: int | None) -> ServeAppError | None:
    if alternatives is None:
        return None
    if alternatives < 0:
        return InvalidRequest("prompt_logprobs is at least 0", param="prompt_logprobs")
    most = MOST_TOLD // tokens - 1
    if alternatives <= most:
        return None
    return InvalidRequest(
        f"{alternatives} alternatives for each of {tokens} tokens are more than one answer tells; "
        + (f"ask for at most {most}" if most >= 0 else f"shorten the prompt to at most {MOST_TOLD} tokens"),
        param="prompt_logprobs",
    )


def _too_long(tokens: int, context: int) -> ServeAppError | None:
    if tokens < context:
        return None
    return PromptTooLong(
        f"the prompt has {tokens} tokens; this model takes {context} with the answer, so at most {context - 1}",
        param="prompt",
    )
