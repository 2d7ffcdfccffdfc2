"""LoRA adapters on vLLM: exact alone and beside others, and replaced while their old prompt is in the cache."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from serve_app.core.queries import LoadAdapter
from serve_app.core.requests import Adapter
from serve_app.engines.files.conversion import convert_gguf
from serve_app.engines.files.sources import builtin_gguf
from serve_app.engines.protocol import ReplicaEngine
from tests.engines.subjects import make_engine
from tests.models.adapters import answers_of, merged, save_adapter
from tests.models.concurrent_load import GreedyRequest, generated_answers, reference_answers

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600), pytest.mark.vllm, pytest.mark.long]

PROSE = Path(__file__).parents[2] / "models/prose.txt"


@pytest.fixture(scope="module")
def model() -> Path:
    return convert_gguf(builtin_gguf(), lambda stage: None)


@pytest.fixture(scope="module")
def request_(model: Path) -> GreedyRequest:
    """Longer than two blocks of vLLM for CPUs, so that its beginning is in the prefix cache afterwards."""
    return GreedyRequest(tuple(AutoTokenizer.from_pretrained(model).encode(PROSE.read_text())[:300]), 8)


@pytest.fixture(scope="module")
def adapters(model: Path, request_: GreedyRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Three folders with adapters, in the folder that the engine allows, and the answers of their merged models."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("one", "two", "three")):
        path = save_adapter(model, folder / name, seed, r=8)
        (found[str(path)],) = generated_answers(merged(model, path), [request_])
    assert len({tuple(answer) for answer in found.values()}) == 3
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(adapters: dict[str, list[int]]) -> AsyncIterator[ReplicaEngine]:
    engine = make_engine("vllm", lora={"allow": [str(Path(next(iter(adapters))).parent)], "max_loaded": 3})
    await asyncio.to_thread(engine.start)
    yield engine
    await asyncio.to_thread(engine.stop)


async def test_answers_equal_those_of_the_merged_models_alone_and_together(
    engine: ReplicaEngine, model: Path, request_: GreedyRequest, adapters: dict[str, list[int]]
) -> None:
    (plain,) = reference_answers(model, [request_])
    requests = [(request_, None), *((request_, Adapter(Path(path).name, path)) for path in adapters)]
    alone = [(await answers_of(engine, [request]))[0] for request in requests]
    assert alone == [plain, *adapters.values()]
    assert await answers_of(engine, requests) == alone


async def test_a_replaced_adapter_never_meets_the_old_cache(
    engine: ReplicaEngine, request_: GreedyRequest, adapters: dict[str, list[int]]
) -> None:
    one, two, _ = adapters
    folder = Path(one).parent / "changing"
    shutil.copytree(one, folder)
    adapter = Adapter("changing", str(folder))
    for source in (one, two):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        digest = engine.answer(LoadAdapter(adapter))
        assert isinstance(digest, str)
        loaded = replace(adapter, digest=digest)
        assert await answers_of(engine, [(request_, loaded)]) == [adapters[source]]
        assert await answers_of(engine, [(request_, loaded)]) == [adapters[source]], "from the prefix cache"
