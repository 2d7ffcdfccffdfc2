"""The memory that vLLM needs, against its own reports; the start of a replica; the commands that print both."""

from __future__ import annotations

import json
import re

import pytest

from infra_pulumi import catalogue, cold_start, model_sizing
from infra_pulumi.__main__ import main
from infra_pulumi.catalogue import InstanceType
from infra_pulumi.sizing_facts import GIB, Dtype, Load
from infra_pulumi.vllm_sizing import VllmFit, VllmSetup, fit, kv_bytes_per_token, kv_tokens
from tests.configs import gpu_examples

GRAPHS = VllmSetup()
EAGER = VllmSetup(enforce_eager=True)


def machine(gpu_memory_gib: float, gpus: int = 8) -> InstanceType:
    """A machine of the catalogue with other GPUs."""
    known = catalogue.load().get("aws", "p4d.24xlarge")
    return known.model_copy(update={"gpu_memory_gib": gpu_memory_gib, "gpu_count": gpus})


@pytest.mark.parametrize(("tensor", "reported_gib"), [(1, 53.29), (2, 71.29 - 7.48 - 3.58 - 1.26)])
def test_the_kv_cache_of_an_8b_model_is_close_to_what_vllm_reports(tensor: int, reported_gib: float) -> None:
    """Llama-3-8B on GPUs of 79.22 GiB with a utilization of 0.9: vllm-project/vllm, pull request 10511."""
    tokens = kv_tokens(machine(80), 8.03e9, "bfloat16", tensor, GRAPHS)
    predicted_gib = tokens * kv_bytes_per_token(8.03e9, tensor, GRAPHS) / GIB
    assert 0.9 < predicted_gib / reported_gib < 1


@pytest.mark.parametrize(
    ("tensor", "setup", "expected"),
    [
        (1, VllmSetup(), 2 * 32 * 8 * 128 * 2),
        (4, VllmSetup(), 2 * 32 * 2 * 128 * 2),
        (8, VllmSetup(), 2 * 32 * 1 * 128 * 2),
        (16, VllmSetup(), 2 * 32 * 1 * 128 * 2),  # eight heads on 16 GPUs: each head is on two
        (2, VllmSetup(pipeline_parallel=2), 2 * 16 * 4 * 128 * 2),
        (1, VllmSetup(fp8_kv_cache=True), 2 * 32 * 8 * 128),
    ],
)
def test_bytes_per_token_equal_hand_computed_values(tensor: int, setup: VllmSetup, expected: int) -> None:
    assert kv_bytes_per_token(8e9, tensor, setup) == expected


def test_what_needs_memory_leaves_fewer_tokens() -> None:
    usual = kv_tokens(machine(80), 8e9, "bfloat16", 1, GRAPHS)
    assert kv_tokens(machine(80), 8e9, "bfloat16", 1, EAGER) > usual
    assert kv_tokens(machine(80), 8e9, "fp8", 1, GRAPHS) > usual
    assert kv_tokens(machine(80), 8e9, "bfloat16", 1, VllmSetup(gpu_memory_utilization=0.5)) < usual
    assert kv_tokens(machine(80), 8e9, "bfloat16", 1, VllmSetup(fp8_kv_cache=True)) == pytest.approx(2 * usual, abs=2)
    assert kv_tokens(machine(16), 8e9, "bfloat16", 1, GRAPHS) == 0


def test_a_replica_has_the_fewest_gpus_that_hold_one_sequence() -> None:
    load = Load(streams=32, context=8192)
    assert fit(machine(80), 70e9, "bfloat16", load, GRAPHS) == VllmFit(
        4, kv_tokens(machine(80), 70e9, "bfloat16", 4, GRAPHS)
    )
    assert fit(machine(80, gpus=2), 70e9, "bfloat16", load, GRAPHS) is None
    assert fit(machine(80), 70e9, "bfloat16", load, VllmSetup(tensor_parallel=2)) is None
    on_two_stages = fit(machine(80), 70e9, "bfloat16", load, VllmSetup(tensor_parallel=2, pipeline_parallel=2))
    assert on_two_stages is not None
    assert on_two_stages.gpus == 4
    small = fit(machine(24), 8e9, "bfloat16", load, GRAPHS)
    assert small is not None
    assert small.sequences(load) == small.kv_tokens // 8192 == 1
    assert fit(machine(24), 8e9, "bfloat16", Load(context=131_072), VllmSetup(tensor_parallel=1)) is None


@pytest.mark.parametrize(
    ("number", "weights", "dtype", "gpu_memory_gib", "too_small_gib"),
    [
        (0, 8.03e9, "bfloat16", 48, 16),
        (1, 70.6e9, "fp8", 40, 24),
        (1, 70.6e9, "bfloat16", 80, 40),
        (2, 8.2e9, "bfloat16", 48, 24),
    ],
)
def test_the_examples_in_the_deploy_page_fit_into_the_memory_that_it_names(
    number: int, weights: float, dtype: Dtype, gpu_memory_gib: float, too_small_gib: float
) -> None:
    engine = gpu_examples()[number][0]["engine"]
    setup = VllmSetup(tensor_parallel=engine.get("tensor_parallel", 1))
    load = Load(streams=64, context=engine["max_context"])
    found = fit(machine(gpu_memory_gib), weights, dtype, load, setup)
    assert found is not None
    assert found.sequences(load) >= 4
    assert fit(machine(too_small_gib), weights, dtype, load, setup) is None


@pytest.mark.parametrize(("dtype", "on_turing"), [("float16", True), ("bfloat16", False), ("fp8", False)])
def test_fp8_and_bfloat16_need_ampere(dtype: Dtype, on_turing: bool) -> None:
    found = model_sizing.ranked(catalogue.load(), 1e9, dtype, Load(), {}, VllmSetup())
    assert any(each.machine.gpu == "T4" for each in found) == on_turing
    assert any(each.machine.gpu == "A10G" for each in found)


def test_the_command_lists_tokens_and_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["catalogue", "--engine", "vllm", "--fits", "8b", "--dtype", "bfloat16", "--context", "8192"]
    assert main(flags) == 0
    output = capsys.readouterr().out
    assert re.search(r"g5\.xlarge +1 x 1 GPU +[\d.]+ +14,\d{3} +1 ", output)
    assert "the most are `sequences` of 8192 tokens at a time" in output
    assert main([*flags, "--json", "--tensor-parallel", "4", "--provider", "aws"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["gpus_per_replica"] for each in found} == {4}
    assert all(each["kv_tokens"] >= 8192 for each in found)
    assert main([*flags, "--gpu-memory-utilization", "0.1", "--tensor-parallel", "1"]) == 0
    assert "no machine holds the weights and one sequence of 8192 tokens, 16 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-parallel", "2"], "--tensor-parallel needs --engine vllm"),
        (["--enforce-eager"], "--enforce-eager needs --engine vllm"),
        (["--dtype", "fp8"], "--dtype fp8 needs --engine vllm"),
    ],
)
def test_flags_of_vllm_need_vllm(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue", "--fits", "8b", *flags]) == 2
    assert message in capsys.readouterr().err


# --- the start of a replica


def names(engine: cold_start.Engine) -> set[str]:
    return {phase.name for phase in cold_start.phases(engine=engine)}


def test_without_cuda_graphs_vllm_starts_sooner() -> None:
    assert names("vllm") - names("vllm-eager") == {"torch.compile, or its cache is read", "CUDA graphs are captured"}
    assert cold_start.total(cold_start.phases(engine="vllm-eager")) < cold_start.total(cold_start.phases(engine="vllm"))


def test_a_replica_that_starts_again_on_its_node_finds_image_and_compiled_code() -> None:
    phases = cold_start.phases(engine="vllm")
    repeated = {phase.name: phase.again for phase in phases if phase.again}
    assert "GPU is registered" not in repeated
    assert not any(name.startswith("image") for name in repeated)
    assert repeated["torch.compile, or its cache is read"] == cold_start.COMPILED_CODE_S < cold_start.COMPILE_S
    assert cold_start.total_again(phases) == pytest.approx(sum(repeated.values()))


@pytest.mark.parametrize(("image_gb", "saved_s"), [(11.6, cold_start.GPU_REGISTERED_S), (0.5, 500 / (11_600 / 121))])
def test_the_prepull_hides_the_part_of_the_pull_that_takes_no_longer_than_the_registration(
    image_gb: float, saved_s: float
) -> None:
    without, with_prepull = (
        cold_start.total(cold_start.phases(image_gb, prepull=prepull)) for prepull in (False, True)
    )
    assert without - with_prepull == pytest.approx(saved_s)
