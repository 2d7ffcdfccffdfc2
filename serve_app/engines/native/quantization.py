"""Chooses the quantization of a model for which the configuration says `quantization: auto`."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

Quantization = Literal["none", "int8", "int4"]
RequestedQuantization = Literal["auto", "none", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantization, and the reason for it as a clause that an operator can read."""

    quantization: Quantization
    reason: str


def choose_quantization(
    requested: RequestedQuantization, flags: Set[str], device: str, not_fused: str | None = None
) -> Choice:
    """The requested quantization; for `auto` int8 where it is measurably faster than the model's own precision.

    `flags` are the processor's instruction sets by Linux's names, `device` is `cpu` or `cuda`, and `not_fused` is the
    reason why the model does not run on the fused path, if it does not.

    `auto` is int8 on CPU on the fused path, if the processor has VNNI (of AVX-512 or of AVX) and no AVX512-BF16: there
    int8 is about twice as fast as bfloat16, which loses less quality. Tokens/s of the embedded model in the engine at
    1, 8 and 32 streams, by `bench --isa` on 2 cores of a Sapphire Rapids:

        level          bfloat16           int8
        avx2           65, 249, 315   115, 295, 334
        avx_vnni       65, 250, 324   134, 545, 747
        avx512_vnni    90, 391, 514   177, 627, 924
    """
    if requested != "auto":
        return Choice(requested, "set by the configuration")
    if device != "cpu":
        return Choice("none", "auto quantizes on CPU only")
    if not_fused is not None:
        return Choice("none", f"auto quantizes on the fused path only: {not_fused}")
    if "avx512_bf16" in flags:
        return Choice("none", "the processor multiplies bfloat16 (AVX512-BF16)")
    if flags & {"avx512_vnni", "avx_vnni"}:
        return Choice("int8", "the processor has VNNI and no AVX512-BF16")
    return Choice("none", "the processor has no VNNI")
