"""The levels of instruction sets to which the engine can be held."""

from __future__ import annotations

import pytest

from serve_app.engines.native.isa import LEVELS, VARIABLE, UnknownIsa, environment, held_to, visible

AVX2 = {"avx", "avx2", "fma"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"}
BEYOND = {"avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"}
SAPPHIRE_RAPIDS = frozenset({*AVX512, *BEYOND, "avx_vnni", "avx512_vnni", "avx512_bf16"})


@pytest.mark.parametrize(
    ("level", "flags"),
    [
        ("avx2", AVX2),
        ("avx_vnni", {*AVX2, "avx_vnni"}),
        ("avx512", AVX512),
        ("avx512_vnni", {*AVX512, "avx512_vnni"}),
        ("avx512_bf16", {*AVX512, "avx512_vnni", "avx512_bf16"}),
    ],
)
def test_a_level_hides_what_is_beyond_it(level: str, flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, level)
    assert held_to() is LEVELS[level]
    assert visible(SAPPHIRE_RAPIDS) == flags
    assert visible(frozenset({"avx", "avx2"})) == {"avx", "avx2"}, "a level adds nothing"


def test_without_the_variable_everything_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        assert held_to() is None
        assert visible(SAPPHIRE_RAPIDS) == SAPPHIRE_RAPIDS


def test_an_unknown_level_is_refused_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sse2")
    with pytest.raises(UnknownIsa, match="SERVE_APP_ISA=sse2: use one of avx2, avx_vnni, avx512, "):
        held_to()


def test_the_environment_holds_the_libraries_too() -> None:
    assert environment("avx2") == {
        "SERVE_APP_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
