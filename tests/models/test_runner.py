"""Runners: models that neither path supports, memory, context, and the choice of the quantization."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from serve_app.config import Model
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native.fused import FusedModel
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.native.linear import Int8DotProductLinear
from serve_app.engines.native.loader import load
from serve_app.engines.native.machine import NotEnoughMemory, processor_flags
from serve_app.engines.native.preparation import prepare
from serve_app.engines.native.quantization import choose_quantization
from serve_app.engines.native.runner import TorchRunner
from tests.models import tiny
from tests.models.concurrent_load import model_config

pytestmark = pytest.mark.model

# Three layers with 2 key-value heads of 12 float32 elements.
TOKEN_BYTES = 3 * 2 * 2 * 12 * 4


def make_runner(model: Model) -> TorchRunner:
    return TorchRunner.from_config(model, lambda stage: None)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("family", tiny.UNSUPPORTED)
def test_a_model_with_another_state_than_keys_and_values_is_refused(family: str, dtype: str, tmp_path: Path) -> None:
    model = model_config(tiny.save(family, tmp_path), max_context=64).model_copy(update={"dtype": dtype})
    with pytest.raises(SourceError, match=r"layers call transformers' attention interface.*not supported"):
        make_runner(model)


@pytest.mark.parametrize("family", tiny.every(tiny.MASKED, ["llama4_text"]))
def test_a_window_that_only_the_mask_expresses_limits_the_context(family: str, tmp_path: Path) -> None:
    """Without the mask the results are correct up to the length of the window only."""
    folder = tiny.save(family, tmp_path, tiny.MASKED)
    assert make_runner(model_config(folder, max_context=64)).context == tiny.MASKED_WINDOW
    assert make_runner(model_config(folder, max_context=16)).context == 16


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_a_window_that_the_layers_pass_does_not_limit_the_context(family: str, tmp_path: Path) -> None:
    assert make_runner(model_config(tiny.save(family, tmp_path), max_context=64)).context == 64


def test_an_exception_in_the_code_of_a_model_is_a_source_error(tmp_path: Path) -> None:
    shape = {"vocab_size": tiny.VOCABULARY, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 96}
    folder = tiny.save("xlnet", tmp_path, {"xlnet": shape})
    with pytest.raises(SourceError, match="XLNetLMHeadModel cannot be run: Expected tensor"):
        make_runner(model_config(folder, max_context=64))


@pytest.mark.parametrize("family", ["bert", "diffllama"])
def test_a_model_with_other_attention_fails_the_self_test(family: str, tmp_path: Path) -> None:
    """BERT attends to later tokens, DiffLlama subtracts attention results."""
    folder = tiny.save(family, tmp_path, {family: tiny.FAMILIES["llama"]})
    with pytest.raises(SourceError, match=r"does not compute the logits of the unmodified model.*not supported"):
        make_runner(model_config(folder, max_context=64))


def test_a_model_with_an_indexer_is_refused(tmp_path: Path) -> None:
    """The keys of the indexer would be lost."""
    indexer = {"index_topk": 8, "index_n_heads": 4, "index_head_dim": 16}
    folder = tiny.save("deepseek_v32", tmp_path, {"deepseek_v32": tiny.FAMILIES["deepseek_v3"] | indexer})
    with pytest.raises(SourceError, match=r"DeepseekV32ForCausalLM"):
        make_runner(model_config(folder, max_context=64))


def test_the_cache_holds_the_tokens_of_its_memory_budget(tmp_path: Path) -> None:
    """On CPU an unused slot takes no memory, so that the number of slots is max_running."""
    folder = tiny.save("llama", tmp_path)
    for tokens in (64, 500, 8 * 64):
        runner = make_runner(
            model_config(folder, max_running=8, max_context=64, kv_memory_bytes=tokens * TOKEN_BYTES + 5)
        )
        assert (runner.slots, runner.kv_tokens) == (8, tokens)
    assert make_runner(model_config(folder, max_running=8, max_context=64)).kv_tokens == 8 * 64


def test_a_budget_below_one_sequence_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    with pytest.raises(
        NotEnoughMemory, match=r"64 tokens needs 0\.0352 MiB of KV memory, the budget is 0\.0352 MiB.*max_context"
    ):
        make_runner(model_config(folder, max_context=64, kv_memory_bytes=64 * TOKEN_BYTES - 1))


def test_without_a_configured_context_it_is_the_models_or_what_fits_into_memory(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    own = make_runner(model_config(folder)).context
    assert own == json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    runner = make_runner(model_config(folder, kv_memory_bytes=(own - 1) * TOKEN_BYTES))
    assert (runner.context, runner.kv_tokens) == (own - BLOCK, own - 1)


def test_the_context_is_the_smaller_of_model_and_configuration(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    assert make_runner(model_config(folder, max_context=64)).context == 64
    assert make_runner(model_config(folder, max_context=4096)).context == 256


ICE_LAKE = frozenset({"avx2", "avx512f", "avx512_vnni"})


@pytest.mark.parametrize(
    ("family", "kind", "quantization", "reason"),
    [
        ("llama", "fused", "int8", "the processor has VNNI and no AVX512-BF16"),
        ("gpt2", "transformers", "none", "auto quantizes on the fused path only: the fused path supports the model"),
    ],
)
def test_auto_quantizes_on_the_fused_path_only_and_logs_the_reason(
    family: str, kind: str, quantization: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = model_config(tiny.save(family, tmp_path, tiny.FAMILIES | tiny.FUSED), max_running=2, max_context=64)
    loaded = load(config, lambda stage: None)
    with caplog.at_level(logging.INFO):
        runner = TorchRunner(prepare(loaded, "auto", flags=ICE_LAKE), config.native_options)
    assert (runner.kind, runner.quantization) == (kind, quantization)
    assert f"quantization {quantization} ({reason}" in caplog.text
    assert runner.dtype_name == "float32"
    if isinstance(runner._model, FusedModel):
        assert isinstance(runner._model._layers[0].qkv, Int8DotProductLinear)


def test_an_explicit_quantization_is_used_on_any_processor(tmp_path: Path) -> None:
    config = model_config(tiny.save("llama", tmp_path, tiny.FUSED), max_running=2, max_context=64)
    runner = TorchRunner(prepare(load(config, lambda stage: None), flags=ICE_LAKE), config.native_options)
    assert runner.quantization == "none"


def test_the_default_quantization_is_chosen_by_this_processor(tmp_path: Path) -> None:
    fields = model_config(tiny.save("llama", tmp_path, tiny.FUSED), max_running=2, max_context=64).model_dump()
    del fields["quantization"]
    assert (
        make_runner(Model(**fields)).quantization == choose_quantization("auto", processor_flags(), "cpu").quantization
    )
