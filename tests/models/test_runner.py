"""What a runner needs of a model and of the machine, and how it says that it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import Model
from serve_app.engines.native.loader import SourceError
from serve_app.engines.native.machine import NotEnoughMemory
from serve_app.engines.native.runner import TorchRunner
from tests.models import tiny
from tests.models.concurrent_load import model_config

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


@pytest.mark.parametrize("family", tiny.MASKED)
def test_a_window_that_only_a_mask_would_tell_bounds_the_context(family: str, tmp_path: Path) -> None:
    """Up to its length the model is right without the mask, and wrong beyond it."""
    folder = tiny.save(family, tmp_path, tiny.MASKED)
    assert made(model_config(folder, max_context=64)).context == tiny.MASKED_WINDOW
    assert made(model_config(folder, max_context=16)).context == 16


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_a_window_that_the_layers_tell_bounds_nothing(family: str, tmp_path: Path) -> None:
    assert made(model_config(tiny.save(family, tmp_path), max_context=64)).context == 64


def test_code_that_cannot_be_called_like_this_is_refused_in_a_sentence(tmp_path: Path) -> None:
    shape = {"vocab_size": tiny.VOCABULARY, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 96}
    folder = tiny.save("xlnet", tmp_path, {"xlnet": shape})
    with pytest.raises(SourceError, match="XLNetLMHeadModel cannot be run here: Expected tensor"):
        made(model_config(folder, max_context=64))


@pytest.mark.parametrize("family", ["bert", "diffllama"])
def test_attention_that_is_not_what_the_arena_gives_is_refused_by_its_answers(family: str, tmp_path: Path) -> None:
    """One reads what comes after, the other takes differences of what its attention gives."""
    folder = tiny.save(family, tmp_path, {family: tiny.FAMILIES["llama"]})
    with pytest.raises(SourceError, match=r"does not give its own answers when run packed.*not supported"):
        made(model_config(folder, max_context=64))


def test_attention_that_chooses_what_it_looks_at_is_refused(tmp_path: Path) -> None:
    """An indexer's own keys would be lost."""
    indexer = {"index_topk": 8, "index_n_heads": 4, "index_head_dim": 16}
    folder = tiny.save("deepseek_v32", tmp_path, {"deepseek_v32": tiny.FAMILIES["deepseek_v3"] | indexer})
    with pytest.raises(SourceError, match=r"DeepseekV32ForCausalLM"):
        made(model_config(folder, max_context=64))


def test_an_arena_holds_as_many_tokens_as_its_budget(tmp_path: Path) -> None:
    """On CPU no slot takes memory before it is used, so there are as many as may run."""
    folder = tiny.save("llama", tmp_path)
    for tokens in (64, 500, 8 * 64):
        runner = made(model_config(folder, max_running=8, max_context=64, kv_memory_bytes=tokens * TOKEN_BYTES + 5))
        assert (runner.slots, runner.kv_tokens) == (8, tokens)
    assert made(model_config(folder, max_running=8, max_context=64)).kv_tokens == 8 * 64


def test_no_slot_at_all_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    with pytest.raises(
        NotEnoughMemory, match=r"64 tokens needs 0\.0352 MiB of KV memory, the budget is 0\.0352 MiB.*max_context"
    ):
        made(model_config(folder, max_context=64, kv_memory_bytes=64 * TOKEN_BYTES - 1))


def test_the_context_is_the_models_or_what_the_file_allows(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    assert made(model_config(folder, max_context=64)).context == 64
    assert made(model_config(folder, max_context=4096)).context == 256
