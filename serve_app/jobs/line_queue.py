"""The lines that this process has claimed: which one starts when, and how its result is written."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.errors import NotReady
from serve_app.jobs import journal
from serve_app.jobs.input import custom_id_of, lines_of
from serve_app.jobs.lines import LineAnswer, LineRunner, encode_answer
from serve_app.jobs.records import Batch, Chunk, Result
from serve_app.jobs.store import JobStore

if TYPE_CHECKING:
    from serve_app.jobs.worker import BatchMeter

log = logging.getLogger(__name__)

# Chunks that one process holds at most: lines that wait for their next try fill a few of them.
_MAX_CHUNKS = 8
# A line that the service failed on is tried so often. A line that was refused because the service is busy, or has
# reached a limit of the tenant, is tried until its batch expires.
_TRIES = 3
# The shortest and the longest wait before the next try, in seconds. It doubles with each try.
_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
# The pause after the database failed.
_PAUSE_S = 1.0


@dataclass(slots=True)
class _Line:
    """A line to run. It starts not before the instant `due` of the event loop."""

    batch: Batch
    chunk: Chunk
    number: int
    document: dict[str, object]
    due: float = 0.0
    tries: int = 0
    failures: int = 0

    @property
    def place(self) -> tuple[str, int]:
        return self.chunk.batch_id, self.chunk.number

    @property
    def model(self) -> object:
        """The model as the line names it."""
        body = self.document["body"]
        assert isinstance(body, dict), "the line has been checked"
        name = body.get("model")
        return name if isinstance(name, str) else None


class LineQueue:
    """Starts lines while there is room for them, and writes their results.

    At most `limit` lines of a model run at the same time, and at most half of the places that interactive requests
    leave free; one line while requests for the model wait. `changed` is called when a line has ended.
    """

    def __init__(
        self,
        store: JobStore,
        owner: str,
        limit: int,
        runner: LineRunner,
        meter: BatchMeter,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._owner = owner
        self._limit = limit
        self._runner = runner
        self._meter = meter
        self._clock = clock
        self._changed = changed
        self._waiting: list[_Line] = []
        self._running: dict[asyncio.Task[None], _Line] = {}
        self._of_model: Counter[str] = Counter()
        self._written: list[tuple[Result, asyncio.Future[None]]] = []
        self._to_write = asyncio.Event()
        self._may_claim = True
        self._full: set[object] = set()  # the models, as lines name them, that had no room lately

    def claim_again(self) -> None:
        """There can be chunks to claim."""
        self._may_claim = True

    async def advance(self) -> None:
        """Start the lines for which there is room, and claim chunks if there are not enough lines. Raises NotReady."""
        self._start()
        while self._may_claim and self._needs_lines():
            claimed = await self._store.call(journal.claim_chunk, self._owner, self._clock())
            self._may_claim = claimed is not None
            if claimed is not None:
                await self._take(*claimed)
            self._start()

    async def renew(self) -> None:
        """Renew the leases, and stop the lines of chunks that are lost. Raises NotReady."""
        before = {line.place for line in (*self._waiting, *self._running.values())}
        lost = before - await self._store.call(journal.renew, self._owner, self._clock())
        self._waiting = [line for line in self._waiting if line.place not in lost]
        for task, line in list(self._running.items()):
            if line.place in lost:
                task.cancel()

    async def stop(self) -> None:
        self._waiting.clear()
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def write_forever(self) -> None:
        """Write results, all that are there in one transaction. A line runs until its result is written."""
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            some, self._written = self._written, []
            try:
                await self._store.call(journal.write, self._owner, [result for result, _ in some], self._clock())
            except NotReady:
                self._written = some + self._written
                self._to_write.set()
                await asyncio.sleep(_PAUSE_S)
                continue
            for result, written in some:
                self._meter.line("failed" if result.failed else "completed")
                if not written.done():
                    written.set_result(None)

    def _needs_lines(self) -> bool:
        now = asyncio.get_running_loop().time()
        held = {line.place for line in (*self._waiting, *self._running.values())}
        startable = sum(line.due <= now and line.model not in self._full for line in self._waiting)
        return len(held) < _MAX_CHUNKS and startable < self._limit

    async def _take(self, batch: Batch, chunk: Chunk) -> None:
        contents = await self._store.call(lines_of, batch.input_file, chunk)
        for number, content in enumerate(contents, chunk.first_line):
            if number not in chunk.answered:
                document = self._runner.parse(content)
                assert isinstance(document, dict), "the line has been checked"
                self._waiting.append(_Line(batch, chunk, number, document))

    def _start(self) -> None:
        """Start the lines that are due and for whose model there is room, the first ones first."""
        now = asyncio.get_running_loop().time()
        later: list[_Line] = []
        self._full.clear()
        for line in self._waiting:
            if line.due > now or line.model in self._full:
                later.append(line)
                continue
            model = self._place_of(line)
            if model is None:
                self._full.add(line.model)
                later.append(line)
                continue
            self._of_model[model] += 1
            task = asyncio.create_task(self._run(line))
            self._running[task] = line
            task.add_done_callback(lambda task, model=model: self._ended(task, model))  # type: ignore[misc]
        self._waiting = later

    def _place_of(self, line: _Line) -> str | None:
        """The model of a line if it has room for one more line; "" for a line without a model of the service."""
        found = self._runner.load(line.document["body"], line.batch.identity)
        if found is None:
            return ""
        model, load = found
        ours = self._of_model[model]
        others = max(0, load.running + load.waiting - ours)
        room = 1 if load.waiting else max(1, min(self._limit, (load.capacity - others) // 2))
        return model if ours < room else None

    async def _run(self, line: _Line) -> None:
        """Run a line, and write its result or put it back."""
        batch = line.batch
        answer = await self._runner.answer(batch.endpoint, line.document["body"], batch.identity)
        if self._tries_again(line, answer):
            self._meter.line("retried")
            self._waiting.append(line)
            return
        content = encode_answer(batch.id, line.number, custom_id_of(line.document), answer)
        result = Result(batch.id, line.chunk.number, line.number, answer.failed, content)
        written = asyncio.get_running_loop().create_future()
        self._written.append((result, written))
        self._to_write.set()
        await written

    def _tries_again(self, line: _Line, answer: LineAnswer) -> bool:
        """Whether a line is run again, and when."""
        if answer.status not in (429, 503) and answer.status < 500:
            return False
        line.tries += 1
        line.failures += answer.status not in (429, 503)
        if line.failures >= _TRIES:
            return False
        wait = min(_LONGEST_WAIT_S, _WAIT_S * 2 ** min(line.tries, 10))
        line.due = asyncio.get_running_loop().time() + max(wait, min(answer.retry_after_s or 0.0, _LONGEST_WAIT_S))
        return True

    def _ended(self, task: asyncio.Task[None], model: str) -> None:
        line = self._running.pop(task)
        self._of_model[model] -= 1
        if not task.cancelled() and (error := task.exception()):
            log.error("Line %s of batch %s failed.", line.number + 1, line.batch.id, exc_info=error)
            line.due = asyncio.get_running_loop().time() + _LONGEST_WAIT_S
            self._waiting.append(line)
        self._changed()
