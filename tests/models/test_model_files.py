"""Folders of safetensors whose files are missing, cut or Git LFS pointers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve_app.engines.files.__main__ import main
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native.loader import load
from serve_app.engines.native.preparation import prepare_from_files
from tests.models import tiny
from tests.models.concurrent_load import model_config

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"
INDEX = "model.safetensors.index.json"


def refusal(folder: Path) -> str:
    """The message of the SourceError, which is raised before the weights are loaded."""
    stages: list[str] = []
    with pytest.raises(SourceError) as error:
        load(model_config(folder), stages.append)
    assert "loading weights" not in stages
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files with an index."""
    single = tiny.save("llama", tmp_path / "single")
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(folder, max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def second(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_shards_are_loaded(sharded: Path) -> None:
    assert load(model_config(sharded), lambda stage: None).context == 256


def test_a_missing_shard_is_named(sharded: Path) -> None:
    count = len(list(sharded.glob("model-*.safetensors")))
    missing = second(sharded)
    missing.unlink()
    assert refusal(sharded) == (
        f"{sharded} lacks 1 of the {count} files that {INDEX} lists: {missing.name}; copy or download them"
    )


def test_a_few_of_many_missing_shards_are_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    for shard in shards:
        shard.unlink()
    assert f"{', '.join(shard.name for shard in shards[:3])}, ...; copy or download them" in refusal(sharded)


@pytest.mark.parametrize("file", ["shard", "tokenizer.json", "config.json", INDEX])
def test_a_git_lfs_pointer_is_recognised(sharded: Path, file: str) -> None:
    pointer = second(sharded) if file == "shard" else sharded / file
    pointer.write_text(POINTER)
    assert (
        refusal(sharded) == f"{pointer} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder"
    )


def test_a_git_lfs_pointer_to_a_single_file_is_recognised(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "model.safetensors").write_text(POINTER)
    assert "model.safetensors is a Git LFS pointer" in refusal(folder)


def test_a_cut_shard_is_named_with_its_sizes(sharded: Path) -> None:
    cut = second(sharded)
    size = cut.stat().st_size
    os.truncate(cut, size // 2)
    assert refusal(sharded) == f"{cut} has {size // 2:,} bytes instead of {size:,}; copy or download the file again"


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {', '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_refused_by_name(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded) == f"{sharded / INDEX} is damaged: it has no weight_map; copy or download the file again"


def test_an_index_beside_a_single_file_is_not_used(tmp_path: Path) -> None:
    """transformers prefers the single file."""
    folder = tiny.save("llama", tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "nowhere.safetensors"}}))
    assert load(model_config(folder), lambda stage: None).context == 256


def test_the_command_prints_the_absolute_folder_or_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save("llama", tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    assert main(["./whole"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'whole'}\n"
    assert main(["./absent"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, "./absent does not exist" in printed.err) == ("", True)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("tensor", "value"),
    [("model.layers.1.self_attn.k_proj.weight", math.nan), ("model.layers.0.mlp.down_proj.weight", math.inf)],
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, tensor: str, value: float, quantization: str) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    model = model_config(folder).model_copy(update={"quantization": quantization})
    with pytest.raises(SourceError) as error:
        prepare_from_files(model, str(folder), lambda stage: None)
    message = f"{folder} has NaN or infinite weights in {tensor}; copy or download its files again"
    assert str(error.value) == message


def test_a_model_that_overflows_its_dtype_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e4
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e4
    save_file(tensors, file, {"format": "pt"})
    model = model_config(folder).model_copy(update={"dtype": "float16"})
    with pytest.raises(SourceError, match="with dtype float16; set dtype: float32"):
        prepare_from_files(model, str(folder), lambda stage: None)
