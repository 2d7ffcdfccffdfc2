"""vLLM as the engine of a replica: one task for each request on the event loop of the replica."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence as Seq
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from serve_app.config import ConfigError, Lora, Model, VllmOptions
from serve_app.core.queries import A, GetModelInfo, LoadAdapter, ModelInfo, Query
from serve_app.core.requests import Adapter
from serve_app.engines.adapters import AdapterCache
from serve_app.engines.admission import Prepared, guarded, prepare
from serve_app.engines.ending import Ending, engine_ended_error, expired_error, stopping_error
from serve_app.engines.files.sources import resolve
from serve_app.engines.protocol import EngineStalled, EngineStats
from serve_app.engines.stream import TokenStream
from serve_app.engines.text.queries import answer
from serve_app.engines.vllm import metrics
from serve_app.engines.vllm.lora import AdapterCopies, AdapterCopy
from serve_app.engines.vllm.shared_memory import SegmentRecord, remove_left_segments
from serve_app.errors import QueueFull, ServeAppError

if TYPE_CHECKING:
    from serve_app.engines.vllm.adapter import TokenReader

logger = logging.getLogger(__name__)

_REMOVE_S = 30.0


class VllmEngine:
    """One model in vLLM. See ReplicaEngine.

    vLLM computes in processes of its own. Its client and the tasks of all requests run on the event loop that creates
    this object and the streams. `report` is called with the stage of the start, in a few words.
    """

    kind = "vllm"

    def __init__(
        self, model: Model, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._options: VllmOptions = model.vllm_options
        self._report = report
        self._lora = model.lora or Lora()
        self._copies = AdapterCopies(self._lora)
        self._adapters = AdapterCache(self._lora.max_loaded, self._copies.load, self._drop_adapter)
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._stopping = False
        self._tasks: dict[TokenStream, asyncio.Task[None]] = {}
        self._admitted = 0  # counted on the admission thread
        self._finished = 0  # counted on the event loop
        self._progress: tuple[float, ...] = ()
        self._progress_at = 0.0

    def start(self) -> None:
        from serve_app.engines.vllm.loading import load

        folder = resolve(self._model, self._report)
        if self._model.lora is not None:
            self._copies.check_against(Path(folder))
        if fault := self._adapters.preload([Adapter(**one.model_dump()) for one in self._lora.adapters]):
            raise ConfigError(fault)
        remove_left_segments()
        self._segments = SegmentRecord()
        with self._segments.watching():
            self._client, self._text = load(self._model, self._options, folder, self._report)
        self._report("warming up vLLM")
        try:
            asyncio.run_coroutine_threadsafe(self._client.warm_up(), self._loop).result()
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout_s: float = 30) -> None:
        """End vLLM's processes. Unfinished requests end with NotReady."""
        self._stopping = True
        if hasattr(self, "_client"):
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._end_requests(), self._loop).result(timeout_s)
            self._client.shutdown()
            self._segments.remove()
        self._copies.close()

    @property
    def quantization(self) -> str:
        """The quantization of the weights by vLLM's name, or `none`."""
        return self._client.quantization

    def acquire_adapter(self, stream: TokenStream) -> ServeAppError | None:
        return self._adapters.acquire_for(stream)

    def admit(self, streams: Seq[TokenStream]) -> list[ServeAppError | None]:
        prepared = prepare(streams, self._text, self._client.context, self._clock())
        outcomes = [one if isinstance(one, ServeAppError) else self._refusal(one) for one in prepared]
        accepted = [one for one, outcome in zip(prepared, outcomes, strict=True) if outcome is None]
        for one in accepted:
            assert isinstance(one, Prepared)
            self._loop.call_soon_threadsafe(self._begin, one)
        return outcomes

    def answer(self, query: Query[A]) -> A | ServeAppError:
        result = guarded(partial(self._answer, query), f"query {type(query).__name__}", "the query failed")
        return cast("A | ServeAppError", result)

    def check(self) -> None:
        if self._client.failed:
            raise EngineStalled("the process of vLLM's engine has ended")

    def step_age(self) -> float:
        """Seconds since vLLM last computed tokens, while requests are unfinished; else 0.

        A check of vLLM's own sees that a process has ended, and does not see that it hangs.
        """
        now, progress = self._clock(), metrics.progress()
        if progress != self._progress or not self._tasks:
            self._progress, self._progress_at = progress, now
        return now - self._progress_at

    def stats(self) -> EngineStats:
        return metrics.stats(self._options.max_running, self._client.kv_tokens)

    def _refusal(self, one: Prepared) -> ServeAppError | None:
        """Why one more request is refused; counts it if it is not."""
        from serve_app.engines.vllm.adapter import resume_error

        if error := resume_error(one):
            return error
        if self._stopping:
            return stopping_error()
        if self._client.failed:
            return engine_ended_error()
        if self._admitted - self._finished >= self._options.max_running + self._options.max_waiting:
            waiting = self._options.max_waiting
            return QueueFull(f"{waiting} requests already wait; try again later", retry_after_s=1)
        self._admitted += 1
        return None

    def _answer(self, query: Query[A]) -> object:
        if isinstance(query, LoadAdapter):
            return self._adapters.reload(query.adapter)
        if isinstance(query, GetModelInfo):
            client, text = self._client, self._text
            return ModelInfo(
                client.context, text.vocabulary, text.special_ids, quantization=client.quantization, dtype=client.dtype
            )
        return answer(query, self._text)

    def _drop_adapter(self, copy: object) -> None:
        """Remove an adapter that no request uses from vLLM, and its copy. Not called on the event loop."""
        assert isinstance(copy, AdapterCopy)
        if hasattr(self, "_client"):
            asyncio.run_coroutine_threadsafe(self._client.remove_adapter(copy), self._loop).result(_REMOVE_S)
        self._copies.drop(copy)

    def _begin(self, one: Prepared) -> None:
        """Start the task of a request, which a closed stream cancels. Called on the event loop."""
        stream = one.stream
        if not self._tasks:
            self._progress_at = self._clock()
        task = self._tasks[stream] = self._loop.create_task(self._follow(one))
        task.add_done_callback(lambda _: self._ended(stream))
        stream.on_close = task.cancel
        if stream.closed or self._stopping:
            task.cancel()

    def _ended(self, stream: TokenStream) -> None:
        del self._tasks[stream]
        self._finished += 1
        if self._stopping and not stream.ended:
            self._fail(stream, stopping_error())

    async def _end_requests(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, one: Prepared) -> None:
        """Pass the tokens of a request to its stream, up to the last one or the error that ends it."""
        from serve_app.engines.vllm.adapter import TokenReader, error_of

        stream, request = one.stream, one.stream.request
        available = self._client.context - len(one.prompt)
        ending = Ending.of(one.plan.params, one.plan.constraint, self._text.end_ids, available)
        reader = TokenReader(one, ending, self._text, self._clock)
        try:
            async with asyncio.timeout(request.deadline - self._clock()):
                await self._read(one, reader, ending)
        except TimeoutError:
            self._fail(stream, expired_error(request, reader.generated))
        except Exception as error:  # noqa: BLE001 - every exception of vLLM ends this request
            self._fail(stream, error_of(error, request.id))

    async def _read(self, one: Prepared, reader: TokenReader, ending: Ending) -> None:
        stream = one.stream
        if error := ending.replay(stream.request.resumed):
            raise error
        unique = f"{stream.request.id}-{next(self._ids)}"
        async with aclosing(self._client.generate(one, ending, self._text.end_ids, unique)) as outputs:
            async for output in outputs:
                for token in reader.read(output):
                    stream.put(token)
                stream.wake()
                if stream.ended or stream.closed:
                    return

    def _fail(self, stream: TokenStream, error: ServeAppError) -> None:
        stream.fail(error)
        stream.wake()
