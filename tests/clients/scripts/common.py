"""What the scripts of the client libraries share. A script runs with the interpreter of the library's environment."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Any

MODEL = "smollm2-135m"
FRANCE = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"
TOWN = "Tell me of a town in Spain."
_CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
# A tool for the weather, as a chat offers it.
WEATHER_TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather now.", "parameters": _CITY}}
]
# More tokens than the context of the model has.
OVERFLOW = "word " * 10_000


def run(*checks: Callable[[str], Any]) -> None:
    """Call each check with the address of the service, and print their results by name as one line of JSON.

    The result of a check is what the client library gave, shortened. A check that fails ends the script.
    """
    print(json.dumps(asyncio.run(_results(checks))))


async def _results(checks: tuple[Callable[[str], Any], ...]) -> dict[str, Any]:
    """One event loop for all checks, because the libraries keep connections."""
    results: dict[str, Any] = {}
    for check in checks:
        began = time.monotonic()
        result = check(sys.argv[1])
        results[check.__name__] = await result if inspect.isawaitable(result) else result
        print(f"{check.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return results


def weather_of(city: str) -> str:
    """The weather of a city, as the tools of the scripts give it."""
    return f"sunny, 25 degrees in {city}"
