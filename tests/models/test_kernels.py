"""The native operations, compared with torch in double precision, and their build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve_app.engines.files.disk_cache import CacheError
from serve_app.engines.native import int4, kernels
from serve_app.engines.native.fused import FusedModel
from serve_app.engines.native.isa import LEVELS, environment, visible
from serve_app.engines.native.linear import DotProductLinear, Int4DotProductLinear, Int8DotProductLinear
from serve_app.engines.native.machine import processor_flags
from serve_app.engines.native.quantization import Quantization
from serve_app.engines.native.rows import Rows
from serve_app.engines.native.runner import TorchRunner
from tests.models import tiny
from tests.models.concurrent_load import model_config

pytestmark = pytest.mark.model

FLOAT, BFLOAT = torch.float32, torch.bfloat16
# The largest error by rounding, relative to the largest result; in float32 also by the order of sums.
ROUNDING = {FLOAT: 3e-6, BFLOAT: 2**-8}
every_type = pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
# AMX tiles round queries and weights of the attention to bfloat16.
TILES = {"amx_tile", "amx_bf16"} <= visible(processor_flags())


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert kernels.available(print), "these tests need a C++ compiler"


def noise(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, wanted: torch.Tensor, rounding: float | None = None) -> bool:
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    return bool(error <= (rounding or ROUNDING[got.dtype]))


ROW_COUNTS = [0, 1, 2, 5, 8, 15, 64, 131]
WIDTHS = [(16, 32), (19, 48), (48, 64), (80, 96), (208, 576)]


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize(("outputs", "inputs"), WIDTHS)
@pytest.mark.parametrize("biased", [True, False])
def test_bfloat16_dot_products_equal_a_matrix_product(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    x, weight = noise(rows, inputs, dtype=BFLOAT), noise(outputs, inputs, dtype=BFLOAT, seed=1)
    bias = noise(outputs, dtype=BFLOAT, seed=2) if biased else None
    layer = DotProductLinear(weight, bias)
    y = layer(x.float())
    assert y.shape == (rows, outputs)
    assert rows == 0 or close(y, x.double() @ weight.double().T + (bias.double() if bias is not None else 0))
    assert torch.equal(layer(x), y.to(BFLOAT))
    assert torch.equal(y, torch.cat([y[:0], *(layer(row[None].float()) for row in x)])), (
        "a row must not depend on other rows"
    )


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize(("outputs", "inputs"), WIDTHS)
@pytest.mark.parametrize("biased", [True, False])
def test_int8_dot_products_are_exact_for_integers(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    """Rows and weights are integers within 8 bits, and the weights use the whole range."""
    x = (noise(rows, inputs) * 40).round().clamp(-127, 127)
    weight = (noise(outputs, inputs, seed=1) * 40).round().clamp(-127, 127)
    x[:, 0], weight[:, 1] = -127, 127
    bias = noise(outputs, seed=2).round() if biased else None
    layer = Int8DotProductLinear(weight, bias)
    y = layer(x)
    assert y.shape == (rows, outputs)
    assert rows == 0 or close(y, x.double() @ weight.double().T + (bias.double() if bias is not None else 0))
    assert torch.equal(y, torch.cat([y[:0], *(layer(row[None]) for row in x)])), "a row must not depend on other rows"


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (19, 64), (80, 96), (208, 576)])
def test_int4_dot_products_equal_those_of_the_same_integers_in_int8(rows: int, outputs: int, inputs: int) -> None:
    x, weight = noise(rows, inputs), noise(outputs, inputs, seed=1)
    weight[0], weight[1, 1] = 0, 1e4  # a group of zeros, and a large weight beside small ones
    layer, integers = Int4DotProductLinear(weight, None, None), int4.quantize(weight, None).integers
    assert integers.abs().amax() <= 127
    y = layer(x)
    layer.weight = torch.ops.serve_app.pack_strips((integers + 128).to(torch.uint8))
    assert torch.equal(y, layer(x))


@pytest.mark.ci
@pytest.mark.timeout(300)
@pytest.mark.parametrize("level", LEVELS)
def test_products_are_right_on_every_lesser_processor(level: str, tmp_path: Path) -> None:
    """The tests of this file on the products, in a process that is held to this level."""
    if not set(LEVELS[level].flags) <= processor_flags():
        pytest.skip(f"this processor does not have {level}")
    cached = {"XDG_CACHE_HOME": str(tmp_path), **environment(level)}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "dot_products", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, **cached}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    assert list(tmp_path.rglob("*.so")), "compiled for the level"


ARM = [("armv8-a", "no dot products"), ("armv8.2-a+dotprod", "dot products of bytes")]


@pytest.mark.ci
@pytest.mark.parametrize("march", [march for march, _ in ARM], ids=[name for _, name in ARM])
def test_lines_are_right_on_arm(march: str, tmp_path: Path) -> None:
    """A program that compares the lines of dots.h with a plain loop, under QEMU: no Arm processor is needed."""
    program, source = tmp_path / "lines", Path(__file__).with_name("dots_check.cpp")
    include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{Path(kernels.__file__).parent}"]
    compiler = ["aarch64-linux-gnu-g++", "-std=c++20", "-O3", f"-march={march}", "-static"]
    subprocess.run([*compiler, *include, str(source), "-o", str(program)], check=True)
    done = subprocess.run(["qemu-aarch64", "-cpu", "max", str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0 of 704 values are wrong\n")


def test_weights_that_do_not_fit_into_strips_are_refused() -> None:
    with pytest.raises(RuntimeError, match="rows of 33, not a multiple of 2"):
        torch.ops.serve_app.pack_strips(noise(16, 33, dtype=BFLOAT))


def normed(rows: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return rows * (rows.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("added", ["nothing", "rows", "normed rows"])
@pytest.mark.parametrize("weighted", [True, False])
def test_add_norm_adds_and_normalizes(rows: int, added: str, weighted: bool) -> None:
    x, out = noise(rows, 96), torch.empty(rows, 96)
    weight = noise(96, seed=1) if weighted else None
    y = None if added == "nothing" else noise(rows, 96, seed=2)
    y_weight = noise(96, seed=3) if added == "normed rows" else None
    total = x.double()
    if y is not None:
        total = total + 0.25 * (y.double() if y_weight is None else normed(y.double(), y_weight))
    torch.ops.serve_app.add_norm(x, y, y_weight, 0.25, weight, 1e-5, out, None)
    assert close(x, total)
    assert close(out, total if weight is None else normed(total, weight))


def test_gated_by_gelu_equals_its_approximation_with_tanh() -> None:
    rows, out = noise(5, 64) * 5, torch.empty(5, 32)
    torch.ops.serve_app.gated(rows, True, out, None)
    gate, up = rows.double().chunk(2, dim=-1)
    assert close(out, torch.nn.functional.gelu(gate, approximate="tanh") * up)


def test_gated_is_finite_for_large_inputs() -> None:
    """Includes inputs for which the exponential function overflows or underflows."""
    rows = noise(5, 64) * 30
    rows[0, :4] = torch.tensor([-200.0, 200.0, -1e30, 0.0])
    out = torch.empty(5, 32)
    torch.ops.serve_app.gated(rows, False, out, None)
    gate, up = rows.double().chunk(2, dim=-1)
    assert close(out[1:], torch.nn.functional.silu(gate[1:]) * up[1:])
    assert torch.isfinite(out[0, 3:]).all()
    assert out[0, 3] == 0


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = heads.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@every_type
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("normed", ["no", "heads", "all heads"])
def test_rope_store_rotates_and_writes_only_its_positions(dtype: torch.dtype, dim: int, normed: str) -> None:
    heads, shared, length = 4, 2, 32
    qkv, angles = noise(3, (heads + 2 * shared) * dim), noise(length, dim // 2, seed=1)
    sizes = {"no": (), "heads": (dim, dim), "all heads": (heads * dim, shared * dim)}[normed]
    norms = [*(noise(size, seed=2 + number) for number, size in enumerate(sizes)), None, None][:2]
    slots, positions = torch.tensor([2, 0, 2]), torch.tensor([7, 31, 8])
    keys, values = torch.zeros(2, 3, shared, length, dim, dtype=dtype)
    before = qkv.double().view(3, -1, dim)
    torch.ops.serve_app.rope_store(qkv, heads, angles.cos(), angles.sin(), *norms, 1e-6, slots, positions, keys, values)
    expected = before.clone()
    for part, norm in ((slice(0, heads), norms[0]), (slice(heads, heads + shared), norms[1])):
        some = before[:, part]
        if norm is not None:
            groups = some.reshape(3, -1, len(norm))
            some = (groups * (groups.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()).view(some.shape)
        cos, sin = (f(angles[positions].double())[:, None] for f in (torch.cos, torch.sin))
        expected[:, part] = rotated(some, cos, sin)
    after = qkv.view(3, -1, dim)
    assert close(after, expected)
    assert torch.equal(after[:, heads + shared :].double(), before[:, heads + shared :])
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert close(keys[slot, :, position], expected[row, heads : heads + shared])
        assert close(values[slot, :, position], expected[row, heads + shared :])
    assert int((keys != 0).any(-1).sum()) == 3 * shared, "no other position may be written"


@every_type
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_what_is_not_finite_is_stored_in_the_cache_as_zero(dtype: torch.dtype, number: float) -> None:
    """The last number is finite, and infinite in bfloat16."""
    qkv, ones = torch.full((1, 3 * 64), number), torch.ones(16, 32)
    keys, values = torch.ones(2, 1, 1, 16, 64, dtype=dtype)
    torch.ops.serve_app.rope_store(
        qkv, 1, ones, ones, None, None, 1e-6, torch.tensor([0]), torch.tensor([3]), keys, values
    )
    assert not keys[0, 0, 3].any()
    assert not values[0, 0, 3].any()


@every_type
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 40])
def test_attend_equals_softmax_attention(dtype: torch.dtype, group: int, window: int) -> None:
    """Rows of several lengths, with old values behind the end of each sequence."""
    check_attention(dtype, group, window, dim=64, cap=0.0)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_attend_supports_heads_of_every_size_and_a_cap_of_the_scores(dim: int, group: int, cap: float) -> None:
    check_attention(BFLOAT, group, window=7, dim=dim, cap=cap)


def check_attention(dtype: torch.dtype, group: int, window: int, dim: int, cap: float) -> None:
    shared, length = 2, 64
    heads, ends = shared * group, [1, 16, 17, 33, 64]
    keys, values = noise(2, 5, shared, length, dim, dtype=dtype, seed=1)
    qkv = noise(5, (heads + 2 * shared) * dim)
    slots, positions = torch.tensor([3, 0, 4, 1, 2]), torch.tensor(ends) - 1
    out = torch.empty(5, heads * dim)
    torch.ops.serve_app.attend(qkv, heads, 0.125, cap, window, slots, positions, keys, values, out, None)
    for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        seen = slice(max(0, end - window) if window else 0, end)
        k, v = (t[slot, :, seen].double().repeat_interleave(group, 0) for t in (keys, values))
        query = qkv[row, : heads * dim].double().view(heads, 1, dim)
        scores = query @ k.transpose(1, 2) * 0.125
        weights = (cap * (scores / cap).tanh() if cap else scores).softmax(-1)
        assert close(out[row], (weights @ v).reshape(-1), 2**-7 if TILES and dtype is BFLOAT else None)


def test_attention_of_a_row_does_not_depend_on_other_rows() -> None:
    keys, values = noise(2, 8, 3, 128, 64, dtype=BFLOAT, seed=1)
    qkv, slots, positions = noise(8, 15 * 64), torch.arange(8), torch.tensor([5, 99, 1, 127, 0, 50, 64, 9])
    out = torch.empty(8, 9 * 64)
    torch.ops.serve_app.attend(qkv, 9, 0.125, 0.0, 0, slots, positions, keys, values, out, None)
    for row in range(8):
        alone, one = torch.empty(1, 9 * 64), slice(row, row + 1)
        torch.ops.serve_app.attend(qkv[one], 9, 0.125, 0.0, 0, slots[one], positions[one], keys, values, alone, None)
        assert torch.equal(alone[0], out[row])


@every_type
@pytest.mark.parametrize("group", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_rows_of_prompts_equal_rows_alone(dtype: torch.dtype, group: int, dim: int, window: int, cap: float) -> None:
    """Two prompts, one of them in two parts, with rows of other sequences between them."""
    ranges = [(3, 0, 45), (0, 99, 100), (1, 90, 101), (1, 101, 128), (2, 5, 9)]
    check_rows_alone(ranges, 128, dtype, group, dim, window, cap)


@every_type
@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize("window", [0, 20, 256, 300])
def test_rows_of_long_prompts_equal_rows_alone(dtype: torch.dtype, group: int, window: int) -> None:
    check_rows_alone([(0, 240, 300), (1, 505, 522), (2, 700, 704), (3, 767, 769)], 800, dtype, group, 64, window, 0.0)


def check_rows_alone(
    ranges: list[tuple[int, int, int]],
    length: int,
    dtype: torch.dtype,
    group: int,
    dim: int,
    window: int,
    cap: float,
) -> None:
    """`ranges` has slots and the positions of their rows, in a cache of `length` positions."""
    shared = 2
    heads = shared * group
    keys, values = noise(2, 5, shared, length, dim, dtype=dtype, seed=1)
    slots = torch.tensor([slot for slot, start, end in ranges for _ in range(start, end)])
    positions = torch.tensor([position for _, start, end in ranges for position in range(start, end)])
    qkv, together = noise(len(slots), (heads + 2 * shared) * dim), torch.empty(len(slots), heads * dim)
    torch.ops.serve_app.attend(qkv, heads, 0.125, cap, window, slots, positions, keys, values, together, None)
    for row in range(len(slots)):
        alone, one = torch.empty(1, heads * dim), slice(row, row + 1)
        place = slots[one], positions[one], keys, values, alone, None
        torch.ops.serve_app.attend(qkv[one], heads, 0.125, cap, window, *place)
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize("rows", [1, 4, 130])
def test_scaled_rows_times_their_multipliers_are_the_unscaled_rows(rows: int) -> None:
    """For quantized layers: results lie in [-1, 1]."""
    x, weight, out, left = noise(rows, 96), noise(96, seed=3), torch.empty(rows, 96), torch.empty(rows)
    plain = torch.empty(rows, 96)
    torch.ops.serve_app.add_norm(x, None, None, 1.0, weight, 1e-5, plain, None)
    torch.ops.serve_app.add_norm(x, None, None, 1.0, weight, 1e-5, out, left)
    assert_scaled(out, left, plain)

    gate_up, half, plain = noise(rows, 96, seed=4), torch.empty(rows, 48), torch.empty(rows, 48)
    torch.ops.serve_app.gated(gate_up, False, plain, None)
    torch.ops.serve_app.gated(gate_up, False, half, left)
    assert_scaled(half, left, plain)

    keys, values = noise(2, rows, 1, 16, 64, seed=5)
    place = torch.arange(rows), torch.full((rows,), 3)
    qkv, out, plain = noise(rows, 4 * 64, seed=6), torch.empty(rows, 128), torch.empty(rows, 128)
    torch.ops.serve_app.attend(qkv, 2, 0.125, 0.0, 0, *place, keys, values, plain, None)
    torch.ops.serve_app.attend(qkv, 2, 0.125, 0.0, 0, *place, keys, values, out, left)
    assert_scaled(out, left, plain)


def assert_scaled(out: torch.Tensor, multipliers: torch.Tensor, plain: torch.Tensor) -> None:
    assert torch.allclose(out.abs().amax(-1), torch.ones(len(plain)), rtol=1e-6)
    assert out.abs().max() <= 1
    assert close(out * multipliers[:, None], plain.double())


@every_type
@pytest.mark.parametrize("width", [1, 15, 16, 1000])
def test_argmax_of_rows_finds_the_first_largest_value(dtype: torch.dtype, width: int) -> None:
    rows = (noise(40, width, dtype=dtype) * 4).round()  # so that many values are equal
    rows[1, width // 2], rows[2, width - 1], rows[3] = torch.inf, -torch.inf, -torch.inf
    rows[4, width // 2] = torch.nan
    values, indices = torch.ops.serve_app.argmax_of_rows(rows)
    assert values[4].isnan()
    valid = [row for row in range(40) if row != 4]
    assert torch.equal(values[valid], rows[valid].float().amax(-1))
    assert torch.equal(indices[valid], rows[valid].float().eq(values[valid][:, None]).int().argmax(-1))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@every_type
@pytest.mark.parametrize("family", tiny.FUSED)
def test_the_native_loop_over_the_layers_equals_the_loop_in_python(
    family: str, dtype: torch.dtype, quantization: Quantization, tmp_path: Path
) -> None:
    """Bit for bit, for decode rows and chunks in one step, with and without rows to sample."""
    folder = tiny.save(family, tmp_path, tiny.FUSED)
    name = {FLOAT: "float32", BFLOAT: "bfloat16"}[dtype]
    config = model_config(folder, max_running=4, max_context=64)
    config = config.model_copy(update={"quantization": quantization, "dtype": name})
    runner = TorchRunner.from_config(config, lambda stage: None)
    model = runner._model
    assert isinstance(model, FusedModel)
    assert model._arguments is not None
    answers = []
    with torch.inference_mode():
        for arguments in (model._arguments, None):
            model._arguments = arguments
            for wanted in ([], [2, 6]):
                rows = Rows([5, 6, 7, 8, 9, 10, 11], [0, 2, 3, 3, 3, 3, 3], [0, 0, 0, 1, 2, 3, 4], wanted, [], [])
                answers.append(model.forward(rows).logits)
    assert torch.equal(answers[1], answers[3])
    assert len(answers[0]) == len(answers[2]) == 0


def test_rows_outside_of_the_cache_are_refused() -> None:
    keys, values = torch.zeros(2, 1, 1, 16, 64)
    qkv, ones = torch.zeros(1, 3 * 64), torch.ones(16, 32)
    for slot, position in ((1, 0), (0, 16), (-1, 0), (0, -1)):
        place = torch.tensor([slot]), torch.tensor([position])
        with pytest.raises(RuntimeError, match="outside the cache"):
            torch.ops.serve_app.rope_store(qkv, 1, ones, ones, None, None, 1e-6, *place, keys, values)


COMPILE_S = 2  # longer than a process waits for the lock before it reports that
BUILD = """
import sys
from pathlib import Path
from serve_app.engines.native import int4, kernels
print(kernels.build(lambda stage: print(stage, flush=True), Path(sys.argv[1])))
"""


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler that takes COMPILE_S. As a linker it writes this module's library, and a line to `calls`."""
    script = tmp_path / "compiler"
    library = kernels.build(print)
    lines = [
        "#!/bin/sh",
        f"made={library}",
        f'case " $* " in *" -c "*) made=/dev/null; sleep {COMPILE_S};; *) echo linked >> {tmp_path / "calls"};; esac',
        'while [ "$1" != -o ]; do shift; done',
        'cp "$made" "$2"',
    ]
    script.write_text("\n".join([*lines, ""]))
    script.chmod(0o755)
    return script


def calls(compiler: Path) -> int:
    return len(compiler.with_name("calls").read_text().splitlines())


def test_of_two_processes_one_builds_the_operations_and_one_reports_that_it_waits(
    compiler: Path, tmp_path: Path
) -> None:
    root = tmp_path / "built"
    command, environment = [sys.executable, "-c", BUILD, str(root)], {**os.environ, "CXX": str(compiler)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    builder, waiter = sorted(process.communicate(timeout=60)[0].splitlines() for process in both)
    (library,) = root.glob("*.so")
    assert calls(compiler) == 1
    assert builder == ["compiling for this processor (once)", str(library)]
    assert waiter[0].startswith(
        f"waiting for another process that compiles the native operations (lock file {library}.lock), 1 s so far"
    )
    assert waiter[-1] == str(library)
    assert [path.suffix for path in sorted(root.iterdir())] == [".so", ".lock", ".sha256"]


LOAD = """
import time
from serve_app.engines.native import int4, kernels
import torch
kernels.start_build()
time.sleep(0.5)
stages = []
assert kernels.available(stages.append)
assert kernels.available(stages.append)
print(stages, hasattr(torch.ops.serve_app, "attend"))
"""


def load_in_a_new_process(compiler: Path, cache: Path) -> str:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(compiler)}
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_the_operations_are_built_in_the_background(compiler: Path, tmp_path: Path) -> None:
    assert load_in_a_new_process(compiler, tmp_path) == "['compiling for this processor (once)'] True"
    assert load_in_a_new_process(compiler, tmp_path) == "[] True"
    assert calls(compiler) == 1


@pytest.mark.parametrize("length", [0, 100_000])
def test_a_truncated_library_is_built_again(compiler: Path, tmp_path: Path, length: int) -> None:
    """The dynamic loader would end the process by SIGBUS."""
    folder = tmp_path / "serve_app" / "kernels"
    library = kernels.build(print)
    folder.mkdir(parents=True)
    for name in (library.name, f"{library.name}.sha256"):
        (folder / name).write_bytes(library.with_name(name).read_bytes())
    os.truncate(folder / library.name, length)
    assert load_in_a_new_process(compiler, tmp_path) == "['compiling for this processor (once)'] True"
    assert calls(compiler) == 1
    assert (folder / library.name).read_bytes() == library.read_bytes()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler"),
        ({"CXX": "false"}, "false failed"),
        ({"SERVE_APP_NATIVE_KERNELS": "0"}, "SERVE_APP_NATIVE_KERNELS=0"),
    ],
)
def test_a_build_that_is_not_possible_raises_the_reason(
    setting: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kernels.Unavailable, match=re.escape(reason)):
        kernels.build(print, tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"file/kernels cannot be made: Not a directory; .*XDG_CACHE_HOME"):
        kernels.build(print, tmp_path / "file" / "kernels")


def test_without_the_operations_the_model_runs_on_the_hugging_face_path(tmp_path: Path) -> None:
    program = (
        "import sys; from tests.models import tiny; from tests.models.concurrent_load import model_config;"
        "from pathlib import Path; from serve_app.engines.native.runner import TorchRunner; f = Path(sys.argv[1]);"
        "print(TorchRunner.from_config(model_config(tiny.save('llama', f, tiny.FUSED)), lambda s: None).kind)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "transformers"
    assert "native kernels are not used, steps are slower: no C++ compiler" in done.stderr
