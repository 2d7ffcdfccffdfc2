"""Instruction sets: those of this processor, or those of a lesser one as which SERVE_APP_ISA makes the engine run.

All that computes is held to the lesser one: the native operations, torch, oneDNN and MKL. Only x86 has names here.
"""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass

from serve_app.engines.files.model_files import SourceError

VARIABLE = "SERVE_APP_ISA"


@dataclass(frozen=True, slots=True)
class Isa:
    """A level of instruction sets: the compiler's name of a processor with it, and the settings of the libraries.

    `flags` are the instruction sets that it adds to those of the level before, by Linux's names.
    """

    march: str
    aten: str
    onednn: str
    mkl: str
    flags: tuple[str, ...]


# From the least to the most. AVX-VNNI belongs to processors without AVX-512, so that it is no step to the others.
LEVELS = {
    "avx2": Isa("haswell", "avx2", "AVX2", "AVX2", ("avx2", "fma")),
    "avx_vnni": Isa("alderlake", "avx2", "AVX2_VNNI", "AVX2", ("avx_vnni",)),
    "avx512": Isa("skylake-avx512", "avx512", "AVX512_CORE", "AVX512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
    "avx512_vnni": Isa("icelake-server", "avx512", "AVX512_CORE_VNNI", "AVX512_E1", ("avx512_vnni",)),
    "avx512_bf16": Isa("cooperlake", "avx512", "AVX512_CORE_BF16", "AVX512_E2", ("avx512_bf16",)),
}
# Instruction sets beyond all levels that this program looks for.
_BEYOND = ("amx_tile", "amx_int8", "amx_bf16", "avx512_fp16")


class UnknownIsa(SourceError):
    """The value of SERVE_APP_ISA is no level; the message names the levels."""


def held_to() -> Isa | None:
    """The level that SERVE_APP_ISA names, None if it is not set. Raises UnknownIsa."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in LEVELS:
        raise UnknownIsa(f"{VARIABLE}={name}: use one of {', '.join(LEVELS)}, or unset it")
    return LEVELS[name]


def environment(name: str) -> dict[str, str]:
    """The variables that hold a new process to a level. The libraries read them when torch is imported."""
    isa = LEVELS[name]
    return {
        VARIABLE: name,
        "ATEN_CPU_CAPABILITY": isa.aten,
        "ONEDNN_MAX_CPU_ISA": isa.onednn,
        "MKL_ENABLE_INSTRUCTIONS": isa.mkl,
    }


def visible(flags: Set[str]) -> frozenset[str]:
    """The processor's instruction sets without those beyond the level of SERVE_APP_ISA."""
    isa = held_to()
    if isa is None:
        return frozenset(flags)
    levels = list(LEVELS.values())
    hidden = {flag for level in levels[levels.index(isa) + 1 :] for flag in level.flags} | set(_BEYOND)
    if "avx512f" not in hidden:
        hidden.add("avx_vnni")
    return frozenset(flags) - hidden
