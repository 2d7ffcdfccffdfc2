"""The catalog passes a request to the model that it names."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from serve_app.core.queries import GetModelInfo, ModelInfo
from serve_app.errors import ModelNotFound
from serve_app.gateway.catalog import Catalog
from tests.gateway.scripted import ScriptedEngine, request

INFO = ModelInfo(1, 1, frozenset())


async def test_each_model_gets_its_own_requests_and_queries() -> None:
    engines = {"m": ScriptedEngine(answer=INFO), "n": ScriptedEngine(answer=replace(INFO, context=2))}
    catalog = Catalog(engines)
    assert [chunk.finished async for chunk in catalog.generate(replace(request("a"), model="n"))] == [False, True]
    assert ([r.id for r in engines["m"].requests], [r.id for r in engines["n"].requests]) == ([], ["a"])
    assert await catalog.query("n", GetModelInfo(), time.monotonic() + 1) == replace(INFO, context=2)
    assert catalog.health("m").name == "m"
    assert catalog.load("m").running == 0


async def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    catalog = Catalog({"m": ScriptedEngine(), "n": ScriptedEngine()})
    with pytest.raises(ModelNotFound, match=r"no model 'x'.*m, n") as found:
        catalog.generate(replace(request(), model="x"))
    assert found.value.param == "model"
    with pytest.raises(ModelNotFound):
        catalog.health("x" * 10_000)
