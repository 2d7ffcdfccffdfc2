"""GGUF files as they come: end tokens, scaled positions, unknown tensors, parts, pointers and cut files."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engines.files import gguf_rope
from serve_app.engines.files.conversion import convert_gguf
from serve_app.engines.files.gguf_header import read_header
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.files.progress import Estimate, Progress
from serve_app.engines.files.sources import builtin_gguf, resolve
from serve_app.engines.native.loader import load
from tests.models import tiny
from tests.models.concurrent_load import model_config

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

IDS = torch.tensor([[(7 * n) % 256 for n in range(150)]])
POSITIONS = torch.arange(IDS.shape[1])[None]
# Half of the elements of a head of 12.
FACTORS = torch.tensor([1.0, 1.0, 1.5, 3.0, 7.0, 8.0])
ORIGINAL = {"llama.rope.scaling.original_context_length": 64}
LINEAR: dict[str, str | float] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
YARN = {**LINEAR, "llama.rope.scaling.type": "yarn", **ORIGINAL}

# The last stage of a refusal by the model, whose weights are not converted then.
CONVERTING = "converting the model file to "


def ignore(stage: str) -> None:
    pass


def convert(source: Path) -> Path:
    return convert_gguf(source, ignore, source.parent / "models")


def rope_of(folder: Path) -> dict[str, Any]:
    parameters: dict[str, Any] = json.loads((folder / "config.json").read_text())["rope_parameters"]
    return parameters


@torch.inference_mode()
def logits(model: Any, positions: torch.Tensor = POSITIONS) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=IDS, position_ids=positions).logits
    return output


def refusal(source: Path, after: str = "checking the model file") -> str:
    """The message of the SourceError, which is raised after the stage `after`; by default the file is only read."""
    stages: list[str] = []
    with pytest.raises(SourceError) as error:
        convert_gguf(source, stages.append, source.parent / "models")
    assert stages[-1].startswith(after)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_ends_of_a_turn_and_of_a_message_end_an_answer(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 65, "tokenizer.ggml.eom_token_id": 66}
    folder = convert(tiny.save_gguf(tmp_path / "model.gguf", metadata=ends))
    assert load(model_config(folder), ignore).text.end_ids == {65, 66, 257}


def test_an_end_token_outside_the_vocabulary_is_ignored(tmp_path: Path) -> None:
    """Some files have 4294967295 for "none"."""
    folder = convert(tiny.save_gguf(tmp_path / "model.gguf", metadata={"tokenizer.ggml.eot_token_id": 2**32 - 1}))
    assert load(model_config(folder), ignore).text.end_ids == {257}


def test_linear_scaling_divides_the_positions(tmp_path: Path) -> None:
    scaled = convert(tiny.save_gguf(tmp_path / "scaled.gguf", metadata=LINEAR))
    plain = AutoModelForCausalLM.from_pretrained(convert(tiny.save_gguf(tmp_path / "plain.gguf")))
    expected = logits(plain, POSITIONS / 4)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(scaled)), expected)
    assert (logits(plain) - expected).abs().max() > 1e-3
    assert load(model_config(scaled), ignore).context == 4 * 256


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(tmp_path: Path, key: str) -> None:
    """As in llama.cpp."""
    rope = rope_of(convert(tiny.save_gguf(tmp_path / "model.gguf", metadata={key: 2.0})))
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.attn_factor": 1.0, **ORIGINAL},
    ],
)
def test_scaling_that_changes_nothing_is_accepted(tmp_path: Path, metadata: Mapping[str, str | float]) -> None:
    assert rope_of(convert(tiny.save_gguf(tmp_path / "model.gguf", metadata=metadata)))["rope_type"] == "default"


def test_yarn_is_the_one_of_transformers(tmp_path: Path) -> None:
    betas: dict[str, str | float] = {
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
    }
    folder = convert(tiny.save_gguf(tmp_path / "model.gguf", metadata=YARN | betas))
    assert rope_of(folder) == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    }
    assert load(model_config(folder), ignore).context == 256


def test_the_factors_of_a_tensor_divide_the_frequencies(tmp_path: Path) -> None:
    """Llama 3.1's files, whose scaling is a tensor."""
    scaled = convert(tiny.save_gguf(tmp_path / "scaled.gguf", extra={"rope_freqs.weight": FACTORS}))
    plain = AutoModelForCausalLM.from_pretrained(convert(tiny.save_gguf(tmp_path / "plain.gguf")))
    model: Any = AutoModelForCausalLM.from_pretrained(scaled)
    actual = logits(model)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / FACTORS)
    plain.model.rotary_emb.inv_freq /= FACTORS
    torch.testing.assert_close(actual, logits(plain))
    assert load(model_config(scaled), ignore).context == 256


def test_longrope_is_the_one_of_transformers(tmp_path: Path) -> None:
    """Phi 3's files of 128k tokens. Within the original range, a head uses the short factors."""
    factors = {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": 2 * FACTORS}
    source = tiny.save_gguf_of(
        "phi3", "phi3", tmp_path / "model.gguf", factors, {"phi3.rope.scaling.original_context_length": 64}
    )
    folder = convert(source)
    rope = rope_of(folder)
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("longrope", 64)
    assert (rope["short_factor"], rope["long_factor"]) == (FACTORS.tolist(), (2 * FACTORS).tolist())
    loaded = load(model_config(folder), ignore)
    assert loaded.context == 64
    # The formula of transformers: sqrt(1 + ln(256 / 64) / ln(64)).
    assert loaded.model.model.rotary_emb.attention_scaling == pytest.approx((1 + 1 / 3) ** 0.5)


def test_the_base_and_the_size_of_the_rotary_embedding_are_those_of_the_file(tmp_path: Path) -> None:
    """transformers does not read the size for this architecture: Phi 4 mini rotates three quarters of a head."""
    metadata: dict[str, str | float] = {"phi3.rope.dimension_count": 6, "phi3.rope.freq_base": 5e5}
    rope = rope_of(convert(tiny.save_gguf_of("phi3", "phi3", tmp_path / "model.gguf", {}, metadata)))
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.5, 5e5)


def test_gemma_3_scales_its_layers_without_a_window_only(tmp_path: Path) -> None:
    """Every sixth layer has no window."""
    metadata = {key.replace("llama", "gemma3"): value for key, value in LINEAR.items()}
    metadata["gemma3.attention.sliding_window"] = 8
    source = tiny.save_gguf_of("gemma3_text", "gemma3", tmp_path / "model.gguf", {}, metadata, layers=6)
    folder = convert(source)
    rope = rope_of(folder)
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    assert rope["sliding_attention"]["rope_type"] == "default"
    assert load(model_config(folder), ignore).context == 256, "Gemma 3 has multiplied its length already"


@pytest.mark.parametrize(
    ("metadata", "extra", "named"),
    [
        ({"llama.rope.scaling.type": "longrope"}, {}, "llama.rope.scaling.type longrope"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type yarn"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 4.0}, {}, "llama.rope.scaling.type su"),
        (YARN | {"llama.rope.scaling.attn_factor": 1.2}, {}, "llama.rope.scaling.attn_factor"),
        (YARN | {"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "llama.rope.scaling.yarn_log_multiplier"),
        (LINEAR | {"llama.rope.scaling.alpha": 1000.0}, {}, "llama.rope.scaling.alpha"),
        (LINEAR, {"rope_freqs.weight": FACTORS}, "rope_freqs.weight and llama.rope.scaling.factor together"),
        ({}, {"rope_factors_long.weight": FACTORS}, "rope_factors_long.weight without rope_factors_short.weight"),
    ],
)
def test_other_scaling_is_refused_by_its_name(
    tmp_path: Path, metadata: Mapping[str, str | float], extra: Mapping[str, torch.Tensor], named: str
) -> None:
    message = refusal(tiny.save_gguf(tmp_path / "model.gguf", metadata=metadata, extra=extra))
    assert f"model.gguf scales its positions ({named}" in message
    assert message.endswith("use the model's safetensors files")


def test_scaling_that_the_model_does_not_apply_is_refused(tmp_path: Path) -> None:
    """Phi 3 has no linear scaling, and Gemma 3 no YaRN."""
    for family, architecture, kind in (("phi3", "phi3", "linear"), ("gemma3_text", "gemma3", "yarn")):
        prefix = f"{architecture}.rope.scaling"
        metadata: dict[str, str | float] = {f"{prefix}.type": kind, f"{prefix}.factor": 4.0}
        source = tiny.save_gguf_of(family, architecture, tmp_path / f"{kind}.gguf", {}, metadata)
        assert f"scales its positions ({prefix}.type)" in refusal(source, CONVERTING)


def test_factors_of_a_wrong_number_are_refused(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": FACTORS[:5]})
    assert "rope_freqs.weight has 5 factors for 12 rotated elements of a head" in refusal(source, CONVERTING)


def test_a_tensor_that_the_model_does_not_use_is_refused(tmp_path: Path) -> None:
    """transformers drops such a tensor silently: here the bias of a layer that has none in this architecture."""
    source = tiny.save_gguf(tmp_path / "model.gguf", extra={"blk.0.attn_q.bias": torch.ones(48)})
    assert "tensors that a LlamaForCausalLM does not use (1: blk.0.attn_q.bias)" in refusal(source, CONVERTING)


def test_frequencies_that_follow_from_the_base_are_not_needed(tmp_path: Path) -> None:
    """Old files of Llama have them."""
    source = tiny.save_gguf(tmp_path / "model.gguf", extra={"blk.0.attn_rot_embd.weight": torch.ones(6)})
    assert (convert(source) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "metadata", "part", "command"),
    [
        ("x-00001-of-00002.gguf", {}, "1 of 2", "{0}/x-00001-of-00002.gguf {0}/x.gguf"),
        ("x-00002-of-00003.gguf", {"split.count": 3, "split.no": 1}, "2 of 3", "{0}/x-00001-of-00003.gguf {0}/x.gguf"),
        ("x.gguf", {"split.count": 2, "split.no": 1}, "2 of 2", "{0}/x-00001-of-00002.gguf {0}/merged.gguf"),
    ],
)
def test_a_part_of_a_split_file_is_refused_with_the_command_that_merges(
    tmp_path: Path, name: str, metadata: Mapping[str, str | float], part: str, command: str
) -> None:
    message = refusal(tiny.save_gguf(tmp_path / name, metadata=metadata))
    assert f"{name} is part {part} of a model" in message
    assert message.endswith(f"llama-gguf-split --merge {command.format(tmp_path)}")


def test_a_later_part_has_no_architecture(tmp_path: Path) -> None:
    """As llama-gguf-split writes it: the parts after the first have tensors and `split.*` only."""
    part = tmp_path / "x-00002-of-00002.gguf"
    tiny.save_gguf_part(part, number=1, count=2)
    assert "is part 2 of 2 of a model" in refusal(part)


def test_a_merged_file_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "x-00001-of-00002.gguf", metadata={"split.count": 0})
    assert (convert(source) / "model.safetensors").is_file()


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    tiny.save_gguf_part(source, number=0, count=1)
    assert "has no general.architecture" in refusal(source)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = tmp_path / "model.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n")
    assert (
        refusal(pointer) == f"{pointer} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder"
    )


def test_a_cut_file_is_refused_with_its_sizes(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf")
    info = max(read_header(source).tensors.values(), key=lambda one: one.start)
    os.truncate(source, 100_000)
    message = f"{source} has 100,000 bytes instead of {info.start + info.size:,}; copy or download the file again"
    assert refusal(source) == message


@pytest.mark.parametrize("length", [0, 3, 8, 23, 200, 5000, 300_000])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path, length: int) -> None:
    cut = tmp_path / "cut.gguf"
    with builtin_gguf().open("rb") as file:
        cut.write_bytes(file.read(length))
    assert f"cut.gguf ends within its header, after {length:,} bytes" in refusal(cut)


@pytest.mark.parametrize(
    "content", [b"GGUF" + bytes(100), b"<!DOCTYPE html>" + bytes(100), b"GGUF\xff\xff\xff\xff" * 20]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(content)
    assert "model.gguf is not a GGUF file that can be read: it does not begin with GGUF" in refusal(other)


def test_a_damaged_header_raises_nothing_but_source_errors(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf", metadata=YARN).read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        content = bytearray(source)
        for at in random.integers(8, 8000, 3):
            content[at] = random.integers(256)
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(content)
        try:
            gguf_rope.scaling(read_header(damaged))
        except SourceError:
            refused += 1
    assert refused > 100


def test_the_header_of_the_embedded_model_is_read_quickly() -> None:
    """gguf-py takes seconds for its vocabulary; every start of a replica reads the header."""
    began = time.monotonic()
    header = read_header(builtin_gguf())
    assert time.monotonic() - began < 1
    assert (header.architecture, header.number("context_length"), len(header.tensors)) == ("llama", 8192, 272)
    norm = header.floats("output_norm.weight")
    assert len(norm) == 576
    assert np.isfinite(norm).all()


def test_a_conversion_reports_its_size_and_its_time_first(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf")
    stages: list[str] = []
    convert_gguf(source, stages.append, tmp_path / "models")
    assert stages[:2] == ["checking the model file", "converting the model file (once)"]
    assert re.fullmatch(r"converting the model file to 0\.3 MB, about \d s", stages[2])


def test_the_progress_of_a_conversion_counts_dequantized_and_written_weights(tmp_path: Path) -> None:
    """The estimate is 3 s to dequantize and 1 s to write, so that dequantizing all weights is three quarters."""
    weights = 2**20
    stages: list[str] = []
    progress = Progress(stages.append, tmp_path, weights, Estimate(0.0, 3.0, 1.0), interval_s=0.01)

    def reported(share: str) -> None:
        end = time.monotonic() + 10
        while not stages[-1].startswith(f"converting the model file: {share}, about ") and time.monotonic() < end:
            time.sleep(0.001)
        assert stages[-1].startswith(f"converting the model file: {share}, about "), stages[-1]
        assert stages[-1].endswith(" left")

    with progress.reported():
        assert stages == ["converting the model file to 4.2 MB, about 4 s"]
        progress.dequantized = weights // 2
        reported("38%")
        progress.dequantized = weights
        reported("75%")
        (tmp_path / "weights").write_bytes(os.urandom(2 * weights))
        os.sync()
        reported("88%")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_long_conversion_reports_its_progress(tmp_path: Path) -> None:
    """A file of 0.3 GB, which becomes 2.2 GB."""
    source = tiny.save_gguf(
        tmp_path / "model.gguf", hidden=2048, inner=8192, feed_forward_length=8192, layers=8, q4_0=True
    )
    stages: list[tuple[float, str]] = []
    began = time.monotonic()
    convert_gguf(source, lambda stage: stages.append((time.monotonic() - began, stage)), tmp_path / "models")
    took_s = time.monotonic() - began
    promised = re.fullmatch(r"converting the model file to 2,15\d\.\d MB, about (\d+) (s|min)", stages[2][1])
    assert promised is not None, stages[2]
    assert took_s / 4 < int(promised[1]) * {"s": 1, "min": 60}[promised[2]] < took_s * 4
    shares = [at for at, stage in stages if stage.endswith(" left")]
    assert len(shares) >= int(took_s / 10) - 1
    assert all(later - earlier > 9 for earlier, later in pairwise(shares))


def test_a_path_in_the_configuration_is_checked(tmp_path: Path) -> None:
    part = tiny.save_gguf(tmp_path / "x-00001-of-00002.gguf")
    with pytest.raises(SourceError, match="is part 1 of 2 of a model"):
        resolve(model_config(part), ignore)
