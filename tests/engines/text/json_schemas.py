"""Random JSON schemas of moderate size. Every valid document of a schema is finite."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ["name", "age", "id", "tags", "city", "size", "ok", "note", "größe", "a b", 'quo"te', "x"]
_PATTERNS = ["^[A-Z]{2}[0-9]{1,3}$", "^(red|green|blue)-[a-f0-9]{4}$", "^[0-9]{4}-[0-9]{2}$", "^[a-z]{1,8}$"]
_VALUES = ["red", "green", "a longer choice", "ü", 7, -3, None, True]


def random_schema(seed: int) -> dict[str, Any]:
    """The schema of an object; the same for the same seed."""
    return _object(random.Random(seed), depth=2)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1 if depth else 0) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _pattern, _integer, _enum, _plain]
    if depth:
        kinds += [_object, _array, _either]
    return rng.choice(kinds)(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 10)}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.choice([0, 5, 100, 100_000])}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(_VALUES, rng.randint(1, 4))}


def _plain(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_string(rng, 0), _integer(rng, 0), _object(rng, depth - 1)]}
