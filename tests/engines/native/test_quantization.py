"""`quantization: auto` for processors with known instruction sets."""

from __future__ import annotations

import pytest

from serve_app.engines.native.quantization import RequestedQuantization, choose_quantization

# Instruction sets that matter, by Linux's names in /proc/cpuinfo.
AVX2 = frozenset({"avx", "avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}
ALDER_LAKE = AVX2 | {"avx_vnni"}
CASCADE_LAKE = AVX512 | {"avx512_vnni"}
ICE_LAKE = CASCADE_LAKE | {"avx512_vbmi2", "avx512_bitalg"}
COOPER_LAKE = CASCADE_LAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ICE_LAKE | {"avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "amx_int8"}
ZEN_4 = ICE_LAKE | {"avx512_bf16"}
ZEN_5 = ZEN_4 | {"avx_vnni"}
GRAVITON_3 = frozenset({"asimd", "asimddp", "sve", "i8mm", "bf16"})


@pytest.mark.parametrize(
    ("flags", "quantization", "reason"),
    [
        (CASCADE_LAKE, "int8", "the processor has VNNI and no AVX512-BF16"),
        (ICE_LAKE, "int8", "the processor has VNNI and no AVX512-BF16"),
        (COOPER_LAKE, "none", "the processor multiplies bfloat16 (AVX512-BF16)"),
        (SAPPHIRE_RAPIDS, "none", "the processor multiplies bfloat16 (AVX512-BF16)"),
        (ZEN_4, "none", "the processor multiplies bfloat16 (AVX512-BF16)"),
        (ZEN_5, "none", "the processor multiplies bfloat16 (AVX512-BF16)"),
        (ALDER_LAKE, "int8", "the processor has VNNI and no AVX512-BF16"),
        (AVX512, "none", "the processor has no VNNI"),
        (AVX2, "none", "the processor has no VNNI"),
        (GRAVITON_3, "none", "the processor has no VNNI"),
        (frozenset(), "none", "the processor has no VNNI"),
    ],
    ids=[
        "Cascade Lake",
        "Ice Lake",
        "Cooper Lake",
        "Sapphire Rapids",
        "Zen 4",
        "Zen 5",
        "Alder Lake",
        "Skylake-X",
        "Haswell",
        "Graviton 3",
        "unknown",
    ],
)
def test_auto_depends_on_the_processor(flags: frozenset[str], quantization: str, reason: str) -> None:
    choice = choose_quantization("auto", flags, "cpu")
    assert (choice.quantization, choice.reason) == (quantization, reason)


def test_auto_does_not_quantize_on_a_gpu() -> None:
    choice = choose_quantization("auto", ICE_LAKE, "cuda")
    assert (choice.quantization, choice.reason) == ("none", "auto quantizes on CPU only")


def test_auto_does_not_quantize_on_the_hugging_face_path() -> None:
    choice = choose_quantization("auto", ICE_LAKE, "cpu", "the fused path supports the model types llama, not gpt2")
    assert choice.quantization == "none"
    assert choice.reason == (
        "auto quantizes on the fused path only: the fused path supports the model types llama, not gpt2"
    )


@pytest.mark.parametrize("requested", ["none", "int8", "int4"])
@pytest.mark.parametrize("flags", [ICE_LAKE, ZEN_4, frozenset()], ids=["Ice Lake", "Zen 4", "unknown"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_explicit_quantization_is_kept(requested: RequestedQuantization, flags: frozenset[str], device: str) -> None:
    choice = choose_quantization(requested, flags, device, "it is not supported")
    assert (choice.quantization, choice.reason) == (requested, "set by the configuration")
