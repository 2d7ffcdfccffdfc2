"""What a runner needs of a model and of the machine, and how it says that it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import Model
from serve_app.engine.loader import SourceError
from serve_app.engine.memory import NotEnoughMemory
from serve_app.engine.runner import TorchRunner
from tests.models import tiny
from tests.models.crowd import model_config

pytestmark = pytest.mark.model

# Three layers of keys and values: 2 heads of 12 float32 each.
TOKEN_BYTES = 3 * 2 * 2 * 12 * 4


def made(model: Model) -> TorchRunner:
    return TorchRunner.from_config(model, lambda stage: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.UNSUPPORTED)
def test_a_model_that_would_be_wrong_is_refused_in_any_precision(family: str, dtype: str, tmp_path: Path) -> None:
    model = model_config(tiny.save(family, tmp_path), max_context=64).model_copy(update={"dtype": dtype})
    with pytest.raises(SourceError, match=r"layers call transformers' attention interface.*not supported"):
        made(model)


def test_an_arena_takes_as_many_slots_as_its_budget_holds(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    for slots in (1, 5, 8):
        budget = (slots + 1) * 64 * TOKEN_BYTES - 1
        assert made(model_config(folder, max_running=8, max_context=64, kv_memory_bytes=budget)).slots == min(slots, 8)


def test_no_slot_at_all_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    with pytest.raises(NotEnoughMemory, match=r"64 tokens needs 0 MiB of KV memory, the budget is 0 MiB.*max_context"):
        made(model_config(folder, max_context=64, kv_memory_bytes=64 * TOKEN_BYTES - 1))


def test_the_context_is_the_models_or_what_the_file_allows(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    assert made(model_config(folder, max_context=64)).context == 64
    assert made(model_config(folder, max_context=4096)).context == 256
