"""LoRA adapters on the native engine: exact alone and beside others, replaced, bounded, and refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import ConfigError, Model
from serve_app.core.queries import LoadAdapter
from serve_app.core.requests import Adapter
from serve_app.engines.files.conversion import convert_gguf
from serve_app.engines.files.sources import builtin_gguf
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.rows import AdapterRows, span
from serve_app.engines.native.runner import TorchRunner
from serve_app.engines.vllm.lora import AdapterCopies, AdapterCopy
from serve_app.errors import InvalidRequest, NotFound, NotReady, QueueFull
from tests.models import tiny
from tests.models.adapters import (
    adapter_of,
    answers_of,
    merged,
    open_stream,
    save_adapter,
    serving,
    with_adapters,
)
from tests.models.concurrent_load import (
    GreedyRequest,
    generated_answers,
    model_config,
    random_requests,
    reference_answers,
)

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

# Each with other target modules, rank and scaling.
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"r": 64, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "mlp": {"r": 5, "target_modules": ["gate_proj", "down_proj"]},
    "patterns": {"r": 16, "rank_pattern": {"layers.1.mlp.up_proj": 3}, "alpha_pattern": {"q_proj": 5}},
}


@dataclass(frozen=True)
class Adapted:
    """A model's folder, and adapters of it with the answers of the merged models; None is the model itself."""

    model: Path
    requests: list[GreedyRequest]
    references: dict[Path | None, list[list[int]]]

    @property
    def folders(self) -> list[Path]:
        return [folder for folder in self.references if folder is not None]


def adapted(model: Path, folder: Path, requests: list[GreedyRequest], kinds: list[str]) -> Adapted:
    references: dict[Path | None, list[list[int]]] = {None: reference_answers(model, requests)}
    for seed, kind in enumerate(kinds):
        adapter = save_adapter(model, folder / kind, seed, **KINDS[kind])
        references[adapter] = generated_answers(merged(model, adapter), requests)
    assert len({json.dumps(answers) for answers in references.values()}) == len(references)
    return Adapted(model, requests, references)


@pytest.fixture(scope="module", params=["fused", "transformers"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A tiny model that runs on the path."""
    shapes = tiny.FUSED if request.param == "fused" else tiny.FAMILIES
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.save("llama", folder / "model", shapes)
    requests = random_requests(4, tiny.VOCABULARY - 1, longest_prompt=60, longest_answer=16, seed=2)
    return adapted(model, folder, [replace(one, cancel_after=None) for one in requests], list(KINDS))


@pytest.fixture(scope="module")
def engine(small: Adapted) -> Iterator[NativeEngine]:
    with serving(config_of(small)) as engine:
        assert engine.kind == ("fused" if "fused" in str(small.model) else "transformers")
        yield engine


@pytest.mark.parametrize(
    ("family", "kind"), [("gemma2", "all"), ("granite", "all"), ("olmo2", "mlp"), ("mixtral", "attention")]
)
async def test_adapters_of_every_layer_structure_equal_the_merged_model(family: str, kind: str, tmp_path: Path) -> None:
    """Norms after the layers, multipliers of what a layer adds, and layers with experts, which are not adapted."""
    requests = random_requests(3, tiny.VOCABULARY - 1, longest_prompt=40, longest_answer=8, seed=3)
    model = tiny.save(family, tmp_path / "model", tiny.FUSED)
    one = adapted(model, tmp_path, [replace(each, cancel_after=None) for each in requests], [kind])
    with serving(config_of(one)) as engine:
        assert engine.kind == "fused"
        for folder, references in one.references.items():
            answers = await answers_of(engine, [(request, adapter_of(folder)) for request in one.requests])
            assert answers == references, folder


def config_of(one: Adapted, **lora: Any) -> Model:
    return with_adapters(model_config(one.model, max_running=8, max_step_tokens=32), *one.folders, **lora)


async def test_answers_equal_those_of_the_merged_model_alone(engine: NativeEngine, small: Adapted) -> None:
    for folder, references in small.references.items():
        for request, reference in zip(small.requests, references, strict=True):
            assert await answers_of(engine, [(request, adapter_of(folder))]) == [reference], folder


async def test_answers_equal_those_of_the_merged_model_beside_all_other_adapters_and_the_base(
    engine: NativeEngine, small: Adapted
) -> None:
    """The prompts are equal, so that a wrong prefix would be found in the cache."""
    for number, request in enumerate(small.requests):
        together = await answers_of(engine, [(request, adapter_of(folder)) for folder in small.references])
        assert together == [references[number] for references in small.references.values()]


async def test_a_prompt_in_the_cache_is_shared_within_an_adapter_only(engine: NativeEngine, small: Adapted) -> None:
    request = GreedyRequest(tuple(range(70)), 4)
    first, second, *_ = small.folders
    await answers_of(engine, [(request, adapter_of(first))])
    for folder, cached in ((first, 64), (second, 0), (None, 0), (second, 64), (None, 64)):
        stream = open_stream(request, adapter_of(folder))
        assert engine.acquire_adapter(stream) is None
        assert engine.admit([stream]) == [None]
        _ = [event async for event in stream.chunks(0)]
        stream.close()
        assert stream.cached_tokens == cached, folder


async def test_a_cache_salt_cannot_stand_for_an_adapter(engine: NativeEngine, small: Adapted) -> None:
    request = GreedyRequest(tuple(range(1, 71)), 4)
    adapter = adapter_of(small.folders[0])
    assert adapter is not None
    digest = engine.answer(LoadAdapter(adapter))
    await answers_of(engine, [(request, adapter)])
    stream = open_stream(request, None, cache_salt=f"{digest}\0")
    assert engine.admit([stream]) == [None]
    _ = [event async for event in stream.chunks(0)]
    assert stream.cached_tokens == 0


async def test_a_replaced_adapter_never_meets_the_old_cache(small: Adapted, tmp_path: Path) -> None:
    one, other = small.folders[:2]
    folder = Path(shutil.copytree(one, tmp_path / "changing"))
    request, adapter = small.requests[0], Adapter("changing", str(folder))
    with serving(with_adapters(model_config(small.model), folder)) as engine:
        old = engine.answer(LoadAdapter(adapter))
        assert await answers_of(engine, [(request, adapter)]) == [small.references[one][0]]
        shutil.copytree(other, folder, dirs_exist_ok=True)
        assert await answers_of(engine, [(request, adapter)]) == [small.references[one][0]], "not loaded again yet"
        new = engine.answer(LoadAdapter(adapter))
        assert isinstance(new, str)
        assert new != old
        assert await answers_of(engine, [(request, adapter)]) == [small.references[other][0]]
        assert await answers_of(engine, [(request, replace(adapter, digest=new))]) == [small.references[other][0]]
        assert await answers_of(engine, [(request, None)]) == [small.references[None][0]]


async def test_a_request_for_content_that_was_replaced_is_refused(small: Adapted) -> None:
    with serving(config_of(small)) as engine:
        stream = open_stream(small.requests[0], adapter_of(small.folders[0], digest="0" * 32))
        refusal = engine.acquire_adapter(stream)
    assert isinstance(refusal, NotReady)
    assert "were replaced after it was loaded" in refusal.message


async def test_at_most_max_loaded_adapters_are_in_memory(small: Adapted) -> None:
    with serving(config_of(small, max_loaded=2)) as engine:
        for folder, references in small.references.items():
            assert await answers_of(engine, [(small.requests[0], adapter_of(folder))]) == references[:1]
            assert len(engine._adapters.loaded) == 2
        streams = [open_stream(small.requests[0], adapter_of(folder)) for folder in small.folders[:3]]
        refusals = [engine.acquire_adapter(stream) for stream in streams]
        assert refusals[:2] == [None, None]
        assert isinstance(refusals[2], QueueFull)
        streams[0].close()
        streams[0].close()
        assert engine.acquire_adapter(streams[2]) is None
        assert len(engine._adapters.loaded) == 2


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.0" in name]:
        tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "DoRA": (edit_config(use_dora=True), "uses DoRA, which is not supported"),
    "saved modules": (edit_config(modules_to_save=["lm_head"]), "uses modules_to_save"),
    "bias": (edit_config(bias="all"), "uses bias all"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "uses init_lora_weights pissa"),
    "rank": (edit_config(r=128), "has rank 128; the model takes 1 to 64. Raise lora.max_rank"),
    "other rank": (edit_config(r=9), "have the shapes"),
    "type": (edit_config(peft_type="LOHA"), "of the type LOHA"),
    "no rank": (edit_config(r=None), "is damaged"),
    "shape": (edit_weights(narrow), "The adapter was made for another model"),
    "layer": (edit_weights(renamed), r"changes model\.layers\.9\.\S+, which is no layer that this model adapts"),
    "magnitudes": (edit_weights(lambda t: t.update({"x.lora_magnitude_vector": torch.ones(1)})), "not supported: x"),
    "not finite": (edit_weights(lambda t: next(iter(t.values())).fill_(torch.nan)), "no finite numbers"),
    "pickled": (pickled, "is pickled"),
    "cut": (cut, "has .* bytes instead of"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_adapter_is_refused(fault: str, engine: NativeEngine, small: Adapted, tmp_path: Path) -> None:
    change, message = BAD[fault]
    folder = Path(shutil.copytree(small.folders[0], tmp_path / "bad"))
    change(folder)
    loader = engine._runner
    loader._lora = with_adapters(config_of(small), folder).lora  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match=message):
        loader.load_adapter(Adapter("bad", str(folder)))


def test_a_model_with_a_bad_adapter_in_its_configuration_does_not_start(small: Adapted, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"lora\.adapters: absent: No adapter: .*adapter_config\.json does not exist"),
        serving(with_adapters(model_config(small.model), tmp_path / "absent")),
    ):
        pass


def test_only_allowed_folders_are_loaded_at_run_time(small: Adapted, tmp_path: Path) -> None:
    """A path out of the folder is refused, also through symbolic links of the folder and of its files."""
    source = small.folders[0]
    allowed = tmp_path / "allowed"
    inside = Path(shutil.copytree(source, allowed / "team" / "one"))
    outside = Path(shutil.copytree(source, tmp_path / "allowed-not"))
    (allowed / "link").symlink_to(outside)
    files = allowed / "files"
    files.mkdir()
    for file in outside.iterdir():
        (files / file.name).symlink_to(file)
    with serving(with_adapters(model_config(small.model), allow=(str(allowed), "owner/name@main"))) as engine:
        assert isinstance(engine.answer(LoadAdapter(Adapter("a", str(inside)))), str)
        assert isinstance(engine.answer(LoadAdapter(Adapter("a", str(allowed / "team/../team/one")))), str)
        for path in (outside, allowed / "link", files, allowed / "../allowed-not", "allowed/team/one", "owner/name"):
            refused = engine.answer(LoadAdapter(Adapter("a", str(path))))
            assert isinstance(refused, InvalidRequest), path
            assert "is not in the list lora.allow" in refused.message
        assert isinstance(engine.answer(LoadAdapter(Adapter("a", "owner/name", "other"))), InvalidRequest)
        assert isinstance(engine.answer(LoadAdapter(Adapter("a", str(allowed / "absent")))), NotFound)


def test_a_copy_for_vllm_fits_the_model_and_never_changes(small: Adapted, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small.folders[0], tmp_path / "one"))
    lora = with_adapters(config_of(small), folder).lora
    assert lora is not None
    copies = AdapterCopies(lora)
    copies.check_against(small.model)
    first, copy = copies.load(Adapter("one", str(folder)))
    assert isinstance(copy, AdapterCopy)
    before = (copy.folder / "adapter_model.safetensors").read_bytes()
    edit_weights(narrow)(folder)
    with pytest.raises(InvalidRequest, match="The adapter was made for another model"):
        copies.load(Adapter("one", str(folder)))
    shutil.copytree(small.folders[1], folder, dirs_exist_ok=True)
    second, other = copies.load(Adapter("one", str(folder)))
    assert isinstance(other, AdapterCopy)
    assert (first != second, copy.number != other.number) == (True, True)
    assert (copy.folder / "adapter_model.safetensors").read_bytes() == before
    copies.drop(copy)
    assert not copy.folder.exists()
    copies.close()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """The embedded model with two adapters. The tiny models have one of each kind."""
    folder = tmp_path_factory.mktemp("embedded")
    requests = random_requests(2, vocabulary=49152, longest_prompt=60, longest_answer=12, seed=4)
    return adapted(
        convert_gguf(builtin_gguf(), print),
        folder,
        [replace(one, cancel_after=None) for one in requests],
        ["all", "attention"],
    )


async def test_the_embedded_model_answers_as_the_merged_ones_and_loads_an_adapter_in_a_second(
    embedded: Adapted,
) -> None:
    with serving(config_of(embedded)) as engine:
        assert engine.kind == "fused"
        for number, request in enumerate(embedded.requests):
            requests = [(request, adapter_of(folder)) for folder in embedded.references]
            expected = [references[number] for references in embedded.references.values()]
            assert await answers_of(engine, requests) == expected
            assert [answer for one in requests for answer in await answers_of(engine, [one])] == expected
        largest = max(embedded.folders, key=lambda folder: (folder / "adapter_model.safetensors").stat().st_size)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            assert isinstance(engine.answer(LoadAdapter(Adapter(largest.name, str(largest)))), str)
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < 1, seconds


async def test_a_loaded_adapter_leaves_no_threads_that_slow_down_the_engine(embedded: Adapted) -> None:
    with serving(config_of(embedded)) as engine, ThreadPoolExecutor(1) as pool:
        await answers_of(engine, [(embedded.requests[0], None)])
        pool.submit(int).result()
        before = psutil.Process().num_threads()
        folder = next(folder for folder in embedded.folders if folder.name == "attention")  # rank 64
        assert isinstance(pool.submit(engine.answer, LoadAdapter(Adapter("new", str(folder)))).result(), str)
        assert psutil.Process().num_threads() == before


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "int8"), ("float32", "int8"), ("bfloat16", "none")])
async def test_rounded_answers_are_equal_alone_and_beside_other_adapters(
    embedded: Adapted, dtype: str, quantization: str
) -> None:
    config = config_of(embedded).model_copy(update={"dtype": dtype, "quantization": quantization})
    with serving(config) as engine:
        for request in embedded.requests:
            requests = [(request, adapter_of(folder)) for folder in embedded.references]
            alone = [answer for one in requests for answer in await answers_of(engine, [one])]
            assert await answers_of(engine, requests) == alone


@torch.inference_mode()
def test_int8_adapters_follow_the_rescaled_channels(embedded: Adapted) -> None:
    """`smooth` rescales the channels of the model's weights before it rounds them."""
    adapter, tokens = embedded.folders[0], list(embedded.requests[0].prompt)
    reference = merged(embedded.model, adapter)(torch.tensor([tokens])).logits[0, -1]
    config = config_of(embedded).model_copy(update={"quantization": "int8"})
    runner = TorchRunner.from_config(config, lambda stage: None)
    _, weights = runner.load_adapter(Adapter(adapter.name, str(adapter)))
    rows = span(tokens, slot=0, start=0)
    plain = runner._model.forward(rows).logits[0]
    changed = runner._model.forward(replace(rows, adapters=[AdapterRows(weights, list(range(len(tokens))))])).logits[0]
    cosines = [torch.cosine_similarity(one.float(), reference, dim=0).item() for one in (changed, plain)]
    assert cosines[0] > 0.97, cosines
    assert 1 - cosines[0] < 0.5 * (1 - cosines[1]), cosines
