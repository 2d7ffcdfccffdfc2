"""Sources of models: conversion, download, loading, and the errors for sources that cannot be loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from serve_app.config import Deployment, Model, NativeOptions, Resources
from serve_app.engines.files.conversion import convert_gguf
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.files.sources import builtin_gguf
from serve_app.engines.native.device import choose_device, choose_dtype, cpu_multiplies_bfloat16
from serve_app.engines.native.loader import bitsandbytes_config, load, quantized_by_bitsandbytes
from tests.models import tiny
from tests.models.fake_hub import COMMIT, fake_hub

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

CPU = torch.device("cpu")
CONVERT = (
    "from pathlib import Path; import sys\n"
    "from serve_app.engines.files.conversion import convert_gguf\n"
    "from serve_app.engines.files.sources import builtin_gguf\n"
    "print(convert_gguf(builtin_gguf(), lambda stage: print(stage, flush=True), Path(sys.argv[1])))"
)


def config(source: str | Path, **fields: Any) -> Model:
    deployment = Deployment(max_ongoing_requests=32, max_queued_requests=1, num_replicas=1)
    return Model(name="m", source=str(source), dtype="float32", deployment=deployment, engine=NativeOptions(), **fields)


def refusal(source: str | Path, **fields: Any) -> str:
    """The message of the SourceError, which is raised within 10 s."""
    began = time.monotonic()
    with pytest.raises(SourceError) as error:
        load(config(source, **fields), lambda stage: None)
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)
    return str(error.value)


def converting(root: Path) -> subprocess.Popen[str]:
    """A process that converts the embedded model into `root` and prints each stage."""
    return subprocess.Popen([sys.executable, "-c", CONVERT, str(root)], stdout=subprocess.PIPE, text=True)


def kill_during_conversion(root: Path) -> None:
    victim = converting(root)
    assert victim.stdout is not None
    assert any("converting" in line for line in victim.stdout)
    end = time.monotonic() + 30
    while not any(root.glob(".*/*")) and time.monotonic() < end:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not any(path.is_dir() and not path.name.startswith(".") for path in root.iterdir())


@pytest.mark.long
def test_one_of_several_processes_converts_the_embedded_model(tmp_path: Path) -> None:
    """The first process is killed during the conversion, two start at the same time after it, one starts later."""
    kill_during_conversion(tmp_path)
    both = [converting(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=90)[0].splitlines() for process in both]
    assert sum("converting the model file (once)" in lines for lines in outputs) == 1
    assert sum("waiting for another process that converts the model" in "".join(lines) for lines in outputs) == 1
    folders = {lines[-1] for lines in outputs}
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 30
    stages: list[str] = []
    assert convert_gguf(builtin_gguf(), stages.append, tmp_path) == folder
    assert stages == ["checking the model file"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "no unfinished folder may stay"


def test_a_gguf_file_is_converted_once_and_loaded(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf")
    stages: list[str] = []
    folder = convert_gguf(source, stages.append, tmp_path / "models")
    assert stages[:2] == ["checking the model file", "converting the model file (once)"]
    assert convert_gguf(source, stages.append, tmp_path / "models") == folder
    assert stages[3:] == ["checking the model file"]
    loaded = load(config(folder), lambda stage: None)
    assert (loaded.context, loaded.text.end_ids, loaded.text.vocabulary) == (256, frozenset({257}), 258)


def test_a_truncated_conversion_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf")
    stages: list[str] = []
    folder = convert_gguf(source, stages.append, tmp_path / "models")
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1000])
    assert convert_gguf(source, stages.append, tmp_path / "models") == folder
    assert stages.count("converting the model file (once)") == 2
    assert weights.read_bytes() == before
    assert f"{weights} has {len(before) - 1000:,} bytes instead of {len(before):,}" in caplog.text


def test_a_conversion_into_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    source = tiny.save_gguf(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"model\.gguf/models cannot be made: Not a directory; .*XDG_CACHE_HOME"):
        convert_gguf(source, lambda stage: None, source / "models")


def test_a_conversion_without_enough_space_is_refused_at_once(tmp_path: Path) -> None:
    """By its configuration the model has 5 TB of weights."""
    huge = tiny.save_gguf(tmp_path / "huge.gguf", feed_forward_length=2**32 - 16)
    with pytest.raises(SourceError) as error:
        convert_gguf(huge, lambda stage: None, tmp_path / "models")
    assert re.match(
        rf"the conversion of {huge} needs 4,947,\d\d\d MB in {tmp_path}/models, where [\d,]+ MB are free; ",
        str(error.value),
    )
    assert list((tmp_path / "models").glob("*[0-9]")) == []


def test_a_file_that_is_not_gguf_is_refused_and_leaves_no_files(tmp_path: Path) -> None:
    garbage = tmp_path / "model.gguf"
    garbage.write_bytes(b"GGUF" + bytes(100))
    assert "model.gguf" in refusal(garbage)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_gguf_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    """transformers would initialize the weights at random, and the conversion would keep them."""
    source = tiny.save_gguf(tmp_path / "model.gguf", without="blk.1.ffn_down")
    with pytest.raises(
        SourceError, match=r"lacks weights of a LlamaForCausalLM: model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        convert_gguf(source, lambda stage: None, tmp_path / "models")
    assert list((tmp_path / "models").glob("*[0-9]")) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model")


def test_a_folder_is_loaded(folder: Path) -> None:
    loaded = load(config(folder), lambda stage: None)
    assert loaded.context == 256
    assert loaded.text.end_ids == {256}
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32


def test_every_end_token_of_the_configuration_and_of_the_tokenizer_ends_an_answer(folder: Path) -> None:
    """Llama 3 lists three in generation_config.json; some tokenizers name an end of a turn or of a message."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [65, 66]}))
    file = folder / "tokenizer_config.json"
    symbols = tiny.tokenizer().convert_ids_to_tokens([67, 68])
    named = {"extra_special_tokens": dict(zip(("eot_token", "eom_token"), symbols, strict=True))}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    assert load(config(folder), lambda stage: None).text.end_ids == {65, 66, 67, 68, 256}


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantization_on_a_gpu_needs_bitsandbytes(quantization: str) -> None:
    """bitsandbytes is not installed in the test environment."""
    with pytest.raises(SourceError) as refused:
        quantized_by_bitsandbytes(quantization, "auto")
    message = str(refused.value)
    assert message.startswith(f"quantization: {quantization} on a GPU needs bitsandbytes, which is not installed: ")
    assert "pip install 'serve_app[cuda-quant]'" in message


@pytest.mark.parametrize(
    ("quantization", "dtype", "expected"),
    [
        ("int8", "auto", {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
        ("int4", "auto", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}),
        ("int4", torch.float16, {"bnb_4bit_compute_dtype": "float16"}),
    ],
)
def test_the_configuration_of_bitsandbytes(
    quantization: str, dtype: torch.dtype | str, expected: dict[str, Any]
) -> None:
    """The test machine has no GPU, so that only the configuration can be tested."""
    assert bitsandbytes_config(quantization, dtype).to_dict().items() >= expected.items()


@pytest.mark.parametrize("placement", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_device_map_is_passed_to_accelerate(folder: Path, placement: Any) -> None:
    loaded = load(config(folder, device_map=placement), lambda stage: None)
    assert {parameter.device for parameter in loaded.model.parameters()} == {CPU}


def test_a_missing_device_is_refused(folder: Path) -> None:
    assert "cannot be loaded: Cannot access accelerator" in refusal(folder, device_map={"": 0})


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "has no safetensors weights, and pickled weights are not loaded" in refusal(folder)


def test_the_code_of_a_model_is_not_run_unless_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    document = json.loads((folder / "config.json").read_text())
    document["model_type"] = "own"
    document["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(document))
    assert "trust_remote_code: true" in refusal(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "someone/kernel"),  # CVE-2026-4372
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation", {"text_config": "someone/kernel"}),
        ("_experts_implementation_internal", "someone/kernel@main"),
    ],
)
def test_code_of_another_repository_is_not_run_unless_trusted(folder: Path, key: str, value: object) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"text_config": {key: value}}))
    assert f"config.json: {key} names code of another repository" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(document | {"_attn_implementation_internal": "sdpa"}))
    load(config(folder), print)


def test_code_on_the_hub_needs_a_pinned_revision() -> None:
    assert "trust_remote_code: true needs `revision`" in refusal("someone/model", trust_remote_code=True)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    small = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=257)
    BertModel(small).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert "BertLMHeadModel" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_attention_heads": 5}, "multiple of the number of attention heads"),
        ({"hidden_size": "x"}, "expected int, got str"),
        ({"hidden_size": 64}, "the shapes of the weights do not match config.json"),
        ({"model_type": "nothing"}, "does not recognize this architecture"),
        ({"hidden_act": "nothing"}, "KeyError: 'nothing'"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    document = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(document))
    assert reason in refusal(folder)


def test_an_unsupported_architecture_is_refused_without_the_list_of_all_others(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text()) | {"model_type": "t5"}
    (folder / "config.json").write_text(json.dumps(document))
    message = refusal(folder)
    assert "T5Config" in message
    assert "LlamaConfig" not in message


def test_a_truncated_safetensors_file_is_refused_by_name(folder: Path) -> None:
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1000)
    assert f"{weights} has {size - 1000:,} bytes instead of {size:,}; copy or download" in refusal(folder)


def test_a_folder_without_some_weights_is_refused(folder: Path) -> None:
    """transformers would initialize the missing weights at random."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_a_necessary_file_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "builtin:nothing", "/nowhere/model.gguf"])
def test_a_missing_source_is_refused_with_the_possible_kinds(source: str) -> None:
    message = refusal(source)
    assert source.removeprefix("./") in message
    assert "does not exist; a source is" in message or "no such file" in message


def test_a_file_instead_of_a_folder_is_refused(folder: Path) -> None:
    assert "is neither a folder nor a .gguf file" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "null", "cannot be loaded: TypeError: "),
        ("config.json", '{"model_type": "lla', "is not a valid JSON file"),
        ("model.safetensors", "", "model.safetensors has 0 bytes, fewer than its header"),
        ("tokenizer.json", "garbage", "cannot be loaded"),
        ("tokenizer.json", "{}", "cannot be loaded: KeyError: "),
        ("tokenizer_config.json", "[]", "cannot be loaded: AttributeError: "),
        (
            "generation_config.json",
            '{"eos_token_id": "x"}',
            "eos_token_id in generation_config.json is not a token id",
        ),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, file: str, content: str, reason: str) -> None:
    (folder / file).write_text(content)
    assert reason in refusal(folder)


def test_only_a_replica_that_reserved_a_gpu_uses_it() -> None:
    """The test machine has no GPU: `auto` chooses the CPU for any reservation, and `cuda` is refused."""
    assert choose_device("auto", num_gpus=0) == choose_device("auto", num_gpus=1) == choose_device("cpu", 0) == CPU
    assert "torch finds no GPU" in refusal("builtin:smollm2-135m", device="cuda", resources=Resources(num_gpus=1))


def test_the_dtype_is_the_configured_one_or_depends_on_processor_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert choose_dtype("float16", CPU, tmp_path) == torch.float16
    assert choose_dtype("auto", torch.device("cuda"), tmp_path) == "auto"
    assert choose_dtype("auto", CPU, tmp_path) == torch.bfloat16
    monkeypatch.setenv("SERVE_APP_ISA", "avx2")
    assert not cpu_multiplies_bfloat16()
    assert choose_dtype("auto", CPU, tmp_path) == torch.bfloat16, "the fused path widens bfloat16 in registers"
    monkeypatch.setenv("SERVE_APP_NATIVE_KERNELS", "0")
    assert choose_dtype("auto", CPU, tmp_path) == torch.float32
    monkeypatch.delenv("SERVE_APP_NATIVE_KERNELS")
    for content in ('{"model_type": "gpt2"}', "[]", "{"):
        (tmp_path / "config.json").write_text(content)
        assert choose_dtype("auto", CPU, tmp_path) == torch.float32


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
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}, 128),
        (LONG_ROPE, 64),
    ],
)
def test_the_context_of_batch_dependent_rope_is_its_original_range(
    folder: Path, rope: dict[str, Any], context: int
) -> None:
    document = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(document))
    assert load(config(folder), lambda stage: None).context == context


def test_the_context_is_the_original_range_if_one_layer_type_has_batch_dependent_rope(tmp_path: Path) -> None:
    folder = tiny.save("gemma3_text", tmp_path)
    document = json.loads((folder / "config.json").read_text())
    document["rope_parameters"]["full_attention"] = LONG_ROPE
    (folder / "config.json").write_text(json.dumps(document))
    assert load(config(folder), lambda stage: None).context == 64


DOWNLOAD = """
import sys
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native.loader import load
from tests.models.test_loader import config
for revision in sys.argv[1:]:
    try:
        loaded = load(config("org/model", revision=revision), print)
        print("context", loaded.context)
    except SourceError as error:
        print("refused:", error)
    print("--", flush=True)
"""


def download(home: Path, *revisions: str, **environment: str) -> list[str]:
    """The output for each revision, from a new process: the hub's library reads its settings once."""
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", DOWNLOAD, *revisions]
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split("--\n")[:-1]


def test_a_hub_model_is_downloaded_once_at_its_pinned_revision(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "own.py").write_text("raise SystemExit")
    unknown = "0" * 40
    with fake_hub(folder) as hub:
        first, second, refused = download(tmp_path / "home", COMMIT, COMMIT, unknown, HF_ENDPOINT=hub.url)
    assert "downloading from the model hub: 100% of" in first
    assert "context 256" in first
    assert "context 256" in second
    assert len([path for path in hub.requests if path.endswith("model.safetensors")]) <= 2, "one HEAD and one GET"
    assert not [path for path in hub.requests if path.endswith((".bin", ".py"))]
    assert "refused: org/model is not a folder and cannot be downloaded from the model hub: " in refused
    cached, absent = download(tmp_path / "home", COMMIT, unknown, HF_HUB_OFFLINE="1")
    assert "context 256" in cached
    assert "refused: org/model is not a folder and cannot be downloaded from the model hub: " in absent


@pytest.mark.parametrize("slow", ["ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_without_a_fast_form_is_refused(folder: Path, slow: str) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": slow}))
    assert "the tokenizer has no fast form (tokenizer.json)" in refusal(folder)


def test_the_code_of_a_tokenizer_is_not_run_unless_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    document = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    assert "trust_remote_code: true" in refusal(folder)
    assert not marker.exists()
