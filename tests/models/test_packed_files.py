"""Packed weights in the cache folder: stored once, mapped by later starts, and made again when anything has changed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serve_app.config import Model
from serve_app.engines.native import packed_files
from serve_app.engines.native.fused import FusedModel
from serve_app.engines.native.fused_weights import FusedWeights
from serve_app.engines.native.linear import STORABLE
from serve_app.engines.native.rows import span
from serve_app.engines.native.runner import TorchRunner
from tests.models import tiny
from tests.models.concurrent_load import model_config
from tests.small_disk import fill, small_disk

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

WEIGHTS, DESCRIPTION, USED = "weights.bin", "model.json", "used"
# Prints which heavy modules a start has loaded, and logits. Imports nothing of the tests, which load these modules.
START = """
import sys
from serve_app.config import Model
from serve_app.engines.native.rows import span
from serve_app.engines.native.runner import TorchRunner
runner = TorchRunner.from_config(Model.model_validate_json(sys.argv[1]), lambda stage: None)
print(sorted(sys.modules.keys() & {"transformers.modeling_utils", "transformers.models.llama"}))
print(runner.forward_pass.forward(span([7], slot=0, start=0)).logits.tolist())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the packed weights, in a cache folder of this test with the compiled operations of the user's."""
    kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serve_app/kernels"
    own = tmp_path / "cache/serve_app"
    own.mkdir(parents=True)
    kernels.mkdir(parents=True, exist_ok=True)
    (own / "kernels").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return own / "packed"


def small(folder: Path, **changes: str) -> Model:
    return model_config(folder, max_running=2, max_context=64, cache_weights=True).model_copy(update=changes)


def logits(runner: TorchRunner) -> torch.Tensor:
    rows = span(list(range(1, 30)), slot=0, start=0)
    rows.sample_rows[:] = range(29)
    with torch.inference_mode():
        return runner.forward_pass.forward(rows).logits.float()


def start(model: Model) -> tuple[TorchRunner, list[str]]:
    """A runner, and the stages of its load."""
    stages: list[str] = []
    return TorchRunner.from_config(model, stages.append), stages


def touched(model: Model, folder: Path) -> Model:
    """The same model with other weights in its folder, by their time of change."""
    os.utime(folder / "model.safetensors", ns=(1, 1))
    return model


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_start_maps_the_same_weights(quantization: str, dtype: str, tmp_path: Path, cache: Path) -> None:
    model = small(tiny.save("qwen3", tmp_path / "m", tiny.FUSED), quantization=quantization, dtype=dtype)
    first, packing = start(model)
    later, mapping = start(model)
    assert torch.equal(logits(first), logits(later))
    assert (later.kind, later.quantization, later.dtype_name) == ("fused", quantization, dtype)
    for name in ("context", "kv_tokens", "slots", "weight_count", "weight_bytes", "token_bytes"):
        assert getattr(first, name) == getattr(later, name), name
    assert later.text.end_ids == first.text.end_ids
    assert isinstance(later.forward_pass, FusedModel)
    if not all(isinstance(linear, STORABLE) for linear in later.forward_pass._weights.linears):
        assert entries(cache) == [], "oneDNN's and fbgemm's formats cannot be stored"
        return
    assert "loading weights" in packing
    assert "loading weights" not in mapping


@pytest.mark.ci
def test_a_start_from_the_cache_imports_no_models_of_transformers(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", tiny.FUSED)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    command = [sys.executable, "-c", START, small(folder).model_dump_json()]
    packed, mapped = (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        for _ in range(2)
    )
    assert "transformers.modeling_utils" in packed[0]
    assert mapped[0] == "[]"
    assert mapped[1] == packed[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda model, folder: model.model_copy(update={"dtype": "bfloat16"}),
        lambda model, folder: model.model_copy(update={"quantization": "int8"}),
        touched,
    ],
    ids=["dtype", "quantization", "weights"],
)
def test_a_changed_model_is_packed_again(change: Callable[[Model, Path], Model], tmp_path: Path, cache: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", tiny.FUSED)
    model = small(folder)
    start(model)
    changed, stages = start(change(model, folder))
    assert "loading weights" in stages
    assert changed.kind == "fused"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (WEIGHTS, lambda content: content[:-64]),
        (WEIGHTS, lambda content: bytes(len(content))),
        (DESCRIPTION, lambda content: b"[" + content[1:].replace(b'"heads"', b'"headz"')),
    ],
    ids=["short", "zeros", "other fields"],
)
def test_a_damaged_entry_is_made_again(
    file: str, damage: Callable[[bytes], bytes], tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(tiny.save("llama", tmp_path / "m", tiny.FUSED))
    sound, _ = start(model)
    (entry,) = entries(cache)
    content = (entry / file).read_bytes()
    (entry / file).unlink()
    (entry / file).write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        repaired, _ = start(model)
    assert "packed weights in" in caplog.text or "is damaged and will be made again" in caplog.text
    assert torch.equal(logits(repaired), logits(sound))
    _, stages = start(model)
    _, stages = start(model)
    assert "loading weights" not in stages


def test_a_model_of_the_hugging_face_path_is_not_stored(tmp_path: Path, cache: Path) -> None:
    runner, _ = start(small(tiny.save("gpt2", tmp_path / "m")))
    assert runner.kind == "transformers"
    assert entries(cache) == []


def test_an_option_switches_the_cache_off(tmp_path: Path, cache: Path) -> None:
    start(model_config(tiny.save("llama", tmp_path / "m", tiny.FUSED), max_running=2, max_context=64))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_no_start(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file in the place of the folder")
    runner, _ = start(small(tiny.save("llama", tmp_path / "m", tiny.FUSED)))
    assert runner.kind == "fused"
    assert "the packed weights are not stored" in caplog.text


def test_entries_that_were_not_used_for_long_are_deleted(tmp_path: Path, cache: Path) -> None:
    old, recent, new = (small(tiny.save("llama", tmp_path / name, tiny.FUSED)) for name in ("old", "recent", "new"))
    start(old)
    start(recent)
    month_ago = time.time() - 31 * 24 * 3600
    (entry,) = (entry for entry in entries(cache) if entry.name.startswith("old"))
    os.utime(entry / USED, (month_ago, month_ago))
    start(new)
    assert sorted(entry.name.partition("-")[0] for entry in entries(cache)) == ["new", "recent"]


def test_tensors_that_share_memory_are_stored_once_and_begin_at_cache_lines(tmp_path: Path, cache: Path) -> None:
    """With tied weights in float32 the head is the embedding."""
    model = small(tiny.save("llama", tmp_path / "m", {"llama": tiny.FUSED["llama"] | {"tie_word_embeddings": True}}))
    start(model)
    facts, weights, size = packed_files._read(entries(cache)[0])
    assert isinstance(weights, FusedWeights)
    assert weights.head.weight.data_ptr() == weights.embedding.data_ptr()
    assert all(linear.weight.data_ptr() % 64 == 0 for linear in weights.linears)
    assert size >= sum(linear.weight.nbytes for layer in weights.layers for linear in layer.linears)
    assert facts.context == 256


def test_on_a_full_disk_the_model_runs_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(tiny.save("llama", tmp_path / "m", tiny.FUSED))
    expected = logits(start(model)[0])
    with small_disk(tmp_path / "disk", "1m") as disk:
        own = disk / "serve_app"
        own.mkdir()
        (own / "kernels").symlink_to((cache.parent / "kernels").resolve())
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        filler = fill(disk)
        runner, _ = start(model)
        assert torch.equal(logits(runner), expected)
        assert runner.kind == "fused"
        assert "the packed weights are not stored" in caplog.text
        assert "free space there, or set XDG_CACHE_HOME" in caplog.text
        filler.unlink()
        assert [path for path in own.rglob("*.bin") if "kernels" not in str(path)] == []
        assert torch.equal(logits(start(model)[0]), expected)
        assert len(list(own.glob("packed/*/weights.bin"))) == 1
