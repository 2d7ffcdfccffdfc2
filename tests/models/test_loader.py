"""Sources: what is loaded, what is fetched, what is refused, and what is left behind when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from serve_app.config import Deployment, Engine, Model, Resources
from serve_app.engines.native.loader import (
    SourceError,
    bitsandbytes_config,
    builtin_gguf,
    choose_device,
    choose_dtype,
    convert_gguf,
    cpu_multiplies_bfloat16,
    load,
    quantized_by_bitsandbytes,
)
from tests.models import tiny
from tests.models.fake_hub import COMMIT, hub_of

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

CPU = torch.device("cpu")
CONVERT = "from pathlib import Path; from serve_app.engines.native.loader import *; import sys\n" + (
    "print(convert_gguf(builtin_gguf(), lambda stage: print(stage, flush=True), Path(sys.argv[1])))"
)


def config(source: str | Path, **fields: Any) -> Model:
    deployment = Deployment(max_ongoing_requests=32, max_queued_requests=1, num_replicas=1)
    return Model(name="m", source=str(source), dtype="float32", deployment=deployment, engine=Engine(), **fields)


def refusal(source: str | Path, **fields: Any) -> str:
    """What the operator is told, within seconds."""
    began = time.monotonic()
    with pytest.raises(SourceError) as error:
        load(config(source, **fields), lambda stage: None)
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)
    return str(error.value)


def converting(root: Path) -> subprocess.Popen[str]:
    """A process that converts the embedded model into `root`, and says what it does."""
    return subprocess.Popen([sys.executable, "-c", CONVERT, str(root)], stdout=subprocess.PIPE, text=True)


def kill_in_mid_conversion(root: Path) -> None:
    victim = converting(root)
    assert victim.stdout is not None
    assert any("converting" in line for line in victim.stdout)
    end = time.monotonic() + 30
    while not any(root.glob(".*/*")) and time.monotonic() < end:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not any(path.is_dir() and not path.name.startswith(".") for path in root.iterdir())


def test_a_conversion_is_whole_or_not_there_and_done_once_for_all(tmp_path: Path) -> None:
    """One is killed at work; two come at the same time after it; one comes later."""
    kill_in_mid_conversion(tmp_path)
    both = [converting(tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=90)[0].splitlines() for process in both]
    assert sum("converting the model file (once)" in lines for lines in said) == 1
    folders = {lines[-1] for lines in said}
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 30
    stages: list[str] = []
    assert convert_gguf(builtin_gguf(), stages.append, tmp_path) == folder
    assert stages == ["checking the model file"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "what the killed one left"


def test_a_file_that_is_no_gguf_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    garbage = tmp_path / "model.gguf"
    garbage.write_bytes(b"GGUF" + bytes(100))
    assert "model.gguf" in refusal(garbage)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("length", [0, 3, 8, 200, 5000, 300_000])
def test_a_truncated_gguf_file_is_said_at_once(tmp_path: Path, length: int) -> None:
    cut = tmp_path / "cut.gguf"
    with builtin_gguf().open("rb") as whole:
        cut.write_bytes(whole.read(length))
    assert "cut.gguf cannot be converted: " in refusal(cut)


def renamed(tmp_path: Path, old: bytes, new: bytes) -> Path:
    """The embedded model's file with the name of one tensor changed, which keeps its length."""
    path = tmp_path / "renamed.gguf"
    whole = builtin_gguf().read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    return path


@pytest.mark.timeout(300)
def test_a_gguf_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    """transformers would make it up at random, and the conversion would keep that."""
    lacking = renamed(tmp_path, b"blk.3.ffn_down.weight", b"blk.3.ffn_dawn.weight")
    with pytest.raises(
        SourceError, match=r"lacks weights of a LlamaForCausalLM: model\.layers\.3\.mlp\.down_proj\.weight"
    ):
        convert_gguf(lacking, lambda stage: None, tmp_path / "models")
    assert list((tmp_path / "models").glob("*[0-9]")) == []


def test_a_gguf_file_whose_positions_are_scaled_is_refused(tmp_path: Path) -> None:
    scaled = renamed(tmp_path, b"blk.3.ffn_up.weight", b"x.rope_freqs.weight")
    with pytest.raises(SourceError, match="scales its positions"):
        convert_gguf(scaled, lambda stage: None, tmp_path / "models")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model")


def test_a_folder_is_loaded(folder: Path) -> None:
    loaded = load(config(folder), lambda stage: None)
    assert loaded.context == 256
    assert loaded.text.end_ids == {256}
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantisation_on_a_gpu_needs_its_package(quantization: str) -> None:
    """Which is not here."""
    with pytest.raises(SourceError) as refused:
        quantized_by_bitsandbytes(quantization, "auto")
    told = str(refused.value)
    assert told.startswith(f"quantization: {quantization} on a GPU needs bitsandbytes, which is not installed here: ")
    assert "pip install 'serve_app[cuda-quant]'" in told


@pytest.mark.parametrize(
    ("quantization", "dtype", "told"),
    [
        ("int8", "auto", {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
        ("int4", "auto", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}),
        ("int4", torch.float16, {"bnb_4bit_compute_dtype": "float16"}),
    ],
)
def test_a_gpus_weights_are_quantised_as_they_load(
    quantization: str, dtype: torch.dtype | str, told: dict[str, Any]
) -> None:
    """Nothing here has a GPU: what transformers is told is what can be looked at."""
    assert bitsandbytes_config(quantization, dtype).to_dict().items() >= told.items()


@pytest.mark.parametrize("placement", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_device_map_is_accelerates_business(folder: Path, placement: Any) -> None:
    loaded = load(config(folder, device_map=placement), lambda stage: None)
    assert {parameter.device for parameter in loaded.model.parameters()} == {CPU}


def test_a_device_that_is_not_there_is_said(folder: Path) -> None:
    assert "cannot be loaded: Cannot access accelerator" in refusal(folder, device_map={"": 0})


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "has no safetensors weights, and pickled ones are not loaded" in refusal(folder)


def test_code_of_the_models_own_is_not_run_unless_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    document = json.loads((folder / "config.json").read_text())
    document["model_type"] = "own"
    document["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(document))
    assert "trust_remote_code: true" in refusal(folder)
    assert not marker.exists()


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    small = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=257)
    BertModel(small).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert "BertLMHeadModel" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_attention_heads": 5}, "multiple of the number of attention heads"),
        ({"hidden_size": "x"}, "expected int, got str"),
        ({"hidden_size": 64}, "its weights have other shapes than its config.json gives them"),
        ({"model_type": "nothing"}, "does not recognize this architecture"),
        ({"hidden_act": "nothing"}, "KeyError: 'nothing'"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_said(folder: Path, change: dict[str, Any], told: str) -> None:
    document = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(document))
    assert told in refusal(folder)


def test_a_model_of_another_trade_is_refused_without_the_list_of_all_others(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text()) | {"model_type": "t5"}
    (folder / "config.json").write_text(json.dumps(document))
    said = refusal(folder)
    assert "T5Config" in said
    assert "LlamaConfig" not in said


def test_a_truncated_file_is_said(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(folder) in refusal(folder)


def test_weights_that_are_not_all_there_are_refused(folder: Path) -> None:
    """transformers would make up what is missing, at random."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_what_it_takes_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "builtin:nothing", "/nowhere/model.gguf"])
def test_what_is_not_there_is_said_with_what_could_be(source: str) -> None:
    said = refusal(source)
    assert source.removeprefix("./") in said
    assert "nothing there" in said or "no such file" in said


def test_a_file_in_place_of_its_folder_is_said(folder: Path) -> None:
    assert "is neither a folder nor a .gguf file" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "null", "cannot be loaded: TypeError: "),
        ("config.json", '{"model_type": "lla', "is not a valid JSON file"),
        ("model.safetensors", "", "header too small"),
        ("tokenizer.json", "garbage", "cannot be loaded"),
        ("tokenizer.json", "{}", "cannot be loaded: KeyError: "),
        ("tokenizer_config.json", "[]", "cannot be loaded: AttributeError: "),
        (
            "generation_config.json",
            '{"eos_token_id": "x"}',
            "eos_token_id of its generation_config.json is no token id",
        ),
    ],
)
def test_a_damaged_file_is_said(folder: Path, file: str, content: str, told: str) -> None:
    (folder / file).write_text(content)
    assert told in refusal(folder)


def test_a_gpu_is_used_only_by_who_reserved_one() -> None:
    """There is none here: fake ones of Ray lead to the CPU, and an order for one is refused."""
    assert choose_device("auto", num_gpus=0) == choose_device("auto", num_gpus=1) == choose_device("cpu", 0) == CPU
    assert "torch sees no GPU" in refusal("builtin:smollm2-135m", device="cuda", resources=Resources(num_gpus=1))


def test_the_dtype_is_what_was_asked_for_or_what_the_processor_multiplies() -> None:
    assert choose_dtype("float16", CPU) == torch.float16
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32)
    assert choose_dtype("auto", torch.device("cuda")) == "auto"


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
}


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}, 128),
        (LONG_ROPE, 64),
    ],
)
def test_rope_that_depends_on_the_longest_neighbour_stays_within_its_first_range(
    folder: Path, rope: dict[str, Any], context: int
) -> None:
    document = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(document))
    assert load(config(folder), lambda stage: None).context == context


def test_so_does_rope_of_a_single_kind_of_layers(tmp_path: Path) -> None:
    folder = tiny.save("gemma3_text", tmp_path)
    document = json.loads((folder / "config.json").read_text())
    document["rope_parameters"]["full_attention"] = LONG_ROPE
    (folder / "config.json").write_text(json.dumps(document))
    assert load(config(folder), lambda stage: None).context == 64


FETCH = """
import sys
from serve_app.engines.native.loader import SourceError, load
from tests.models.test_loader import config
try:
    loaded = load(config("org/model", revision=sys.argv[1] if len(sys.argv) > 1 else None), print)
    print("context", loaded.context)
except SourceError as error:
    print("refused:", error)
"""


def fetch(home: Path, *revision: str, **environment: str) -> str:
    """In a process of its own: the hub's library reads its settings once."""
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", FETCH, *revision]
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_a_hub_model_is_fetched_once_at_its_pinned_revision_with_progress(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "own.py").write_text("raise SystemExit")
    with hub_of(folder) as hub:
        said = fetch(tmp_path / "home", COMMIT, HF_ENDPOINT=hub.url)
        assert "fetching from the model hub: 100% of" in said
        assert "context 256" in said
        assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
        before = len(hub.asked)
        assert "context 256" in fetch(tmp_path / "home", COMMIT, HF_ENDPOINT=hub.url)
        assert not [path for path in hub.asked[before:] if "safetensors" in path], "they are here already"
    assert "context 256" in fetch(tmp_path / "home", COMMIT, HF_HUB_OFFLINE="1")


def test_a_hub_that_does_not_have_it_is_quoted(folder: Path, tmp_path: Path) -> None:
    with hub_of(folder) as hub:
        assert "refused: org/model is no folder here" in fetch(tmp_path / "home", "0" * 40, HF_ENDPOINT=hub.url)
    assert "refused: org/model is no folder here" in fetch(tmp_path / "home", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("slow", ["ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_without_a_fast_form_is_refused(folder: Path, slow: str) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": slow}))
    assert "its tokenizer has no fast (tokenizer.json) form" in refusal(folder)


def test_code_of_the_tokenizers_own_is_not_run_either(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    document = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    assert "trust_remote_code: true" in refusal(folder)
    assert not marker.exists()
