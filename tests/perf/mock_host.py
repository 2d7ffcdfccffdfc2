"""One process that runs any number of mock servers: a new one for each configuration on standard input."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeAlias

from perf import loop
from perf.mock import MockConfig, running

MockHost: TypeAlias = Callable[..., str]


@contextmanager
def mock_host() -> Iterator[MockHost]:
    command = [sys.executable, "-m", "tests.perf.mock_host"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def start(**config: Any) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps(config), file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        try:
            yield start
        finally:
            process.terminate()


async def main() -> None:
    async with AsyncExitStack() as servers:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(await servers.enter_async_context(running(MockConfig(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    loop.run(main())
