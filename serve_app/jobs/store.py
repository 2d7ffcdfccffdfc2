"""Opens the database of jobs when it is first used, and calls it from asynchronous code."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.errors import NotReady

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

# Calls that run at the same time. Others wait.
_THREADS = 4
# About the time after which a database that was restarted answers.
_RETRY_S = 5.0


class JobStore:
    """Runs functions on the database in threads. A service whose database is down still answers other requests.

    `failed` is called for each call that fails.
    """

    def __init__(self, options: DatabaseOptions, failed: Callable[[], None] = lambda: None) -> None:
        self._options = options
        self._failed = failed
        self._lock = threading.Lock()
        self._database: Engine | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs")

    async def call(self, function: Callable[Concatenate[Engine, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function of the database. Raises NotReady if the database fails."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: function(self._open(), *args, **kwargs))
        except SQLAlchemyError as error:
            self._failed()
            log.warning("The database of batches failed: %s", str(error).split("\n", 1)[0])
            raise NotReady("The database cannot be used now. Try again later.", retry_after_s=_RETRY_S) from None

    def _open(self) -> Engine:
        with self._lock:
            if self._database is None:
                self._database = open_database(self._options)
            return self._database

    async def close(self) -> None:
        """Wait for the calls that run, and close the connections."""
        await asyncio.to_thread(self._threads.shutdown)
        if self._database is not None:
            self._database.dispose()
