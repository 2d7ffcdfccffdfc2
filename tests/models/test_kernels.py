"""The native operations against plain torch in double precision, and how they are built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve_app.engines.native import kernels
from serve_app.engines.native.fused import LeanModel
from serve_app.engines.native.linear import DotLinear, Int8DotLinear, Quantization
from serve_app.engines.native.rows import Rows
from serve_app.engines.native.runner import TorchRunner
from tests.models import tiny
from tests.models.crowd import model_config

pytestmark = pytest.mark.model

FLOAT, BFLOAT = torch.float32, torch.bfloat16
# What rounding the result costs, against the largest of it; in float32 also the order of sums.
ROUNDING = {FLOAT: 3e-6, BFLOAT: 2**-8}
every_type = pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert kernels.available(print), "this machine has a compiler"


def noise(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    return bool(error <= ROUNDING[got.dtype])


ROW_COUNTS = [0, 1, 2, 5, 8, 15, 64, 131]
WIDTHS = [(16, 32), (19, 48), (48, 64), (80, 96), (208, 576)]


@pytest.fixture
def dots() -> None:
    if not torch.ops.serve_app.has_dots():
        pytest.skip("this processor has no dot products of bytes and bfloat16")


@pytest.mark.usefixtures("dots")
@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize(("outputs", "inputs"), WIDTHS)
@pytest.mark.parametrize("biased", [True, False])
def test_rows_times_bfloat16(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    x, weight = noise(rows, inputs, dtype=BFLOAT), noise(outputs, inputs, dtype=BFLOAT, seed=1)
    bias = noise(outputs, dtype=BFLOAT, seed=2) if biased else None
    layer = DotLinear(weight, bias)
    y = layer(x.float())
    assert y.shape == (rows, outputs)
    assert rows == 0 or close(y, x.double() @ weight.double().T + (bias.double() if bias is not None else 0))
    assert torch.equal(layer(x), y.to(BFLOAT))
    assert torch.equal(y, torch.cat([y[:0], *(layer(row[None].float()) for row in x)])), "alone as in company"


@pytest.mark.usefixtures("dots")
@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize(("outputs", "inputs"), WIDTHS)
@pytest.mark.parametrize("biased", [True, False])
def test_rows_times_int8(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    """Exact on what 8 bits can say: whole numbers, and weights that use the whole range."""
    x = (noise(rows, inputs) * 40).round().clamp(-127, 127)
    weight = (noise(outputs, inputs, seed=1) * 40).round().clamp(-127, 127)
    x[:, 0], weight[:, 1] = -127, 127
    bias = noise(outputs, seed=2).round() if biased else None
    layer = Int8DotLinear(weight, bias)
    y = layer(x)
    assert y.shape == (rows, outputs)
    assert rows == 0 or close(y, x.double() @ weight.double().T + (bias.double() if bias is not None else 0))
    assert torch.equal(y, torch.cat([y[:0], *(layer(row[None]) for row in x)])), "alone as in company"


def test_what_does_not_fit_into_strips_is_refused() -> None:
    with pytest.raises(RuntimeError, match="rows of 33, not a multiple of 2"):
        torch.ops.serve_app.strips(noise(16, 33, dtype=BFLOAT))


@every_type
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("added", [True, False])
def test_add_norm(dtype: torch.dtype, rows: int, added: bool) -> None:
    x, weight, out = noise(rows, 96, dtype=dtype), noise(96, seed=1), torch.empty(rows, 96, dtype=dtype)
    y = noise(rows, 96, dtype=dtype, seed=2) if added else None
    total = (x + y if y is not None else x).clone()
    torch.ops.serve_app.add_norm(x, y, None, weight, 1e-5, out, None)
    assert torch.equal(x, total)
    squares = total.double().pow(2).mean(-1, keepdim=True)
    assert close(out, total.double() * (squares + 1e-5).rsqrt() * weight.double())


@every_type
def test_silu_mul(dtype: torch.dtype) -> None:
    """Far out too, where an exponential overflows or vanishes."""
    rows = noise(5, 64, dtype=dtype) * 30
    rows[0, :4] = torch.tensor([-200.0, 200.0, -1e30, 0.0])
    out = torch.empty(5, 32, dtype=dtype)
    torch.ops.serve_app.silu_mul(rows, None, out, None)
    gate, up = rows.double().chunk(2, dim=-1)
    assert close(out[1:], torch.nn.functional.silu(gate[1:]) * up[1:])
    assert torch.isfinite(out[0, 3:]).all()
    assert out[0, 3] == 0


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = heads.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@every_type
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("normed", [True, False])
def test_rope_store(dtype: torch.dtype, dim: int, normed: bool) -> None:
    heads, shared, length = 4, 2, 32
    qkv, angles = noise(3, (heads + 2 * shared) * dim, dtype=dtype), noise(length, dim // 2, seed=1)
    norms = [noise(dim, seed=2), noise(dim, seed=3)] if normed else [None, None]
    slots, positions = torch.tensor([2, 0, 2]), torch.tensor([7, 31, 8])
    keys, values = torch.zeros(2, 3, shared, length, dim, dtype=BFLOAT)
    before = qkv.double().view(3, -1, dim)
    torch.ops.serve_app.rope_store(
        qkv, None, heads, angles.cos(), angles.sin(), *norms, 1e-6, slots, positions, keys, values
    )
    expected = before.clone()
    for part, norm in ((slice(0, heads), norms[0]), (slice(heads, heads + shared), norms[1])):
        some = before[:, part]
        if norm is not None:
            some = some * (some.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
        cos, sin = (f(angles[positions].double())[:, None] for f in (torch.cos, torch.sin))
        expected[:, part] = rotated(some, cos, sin)
    after = qkv.view(3, -1, dim)
    assert close(after, expected)
    assert torch.equal(after[:, heads + shared :].double(), before[:, heads + shared :])
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert close(keys[slot, :, position], expected[row, heads : heads + shared])
        assert close(values[slot, :, position], expected[row, heads + shared :])
    assert int((keys != 0).any(-1).sum()) == 3 * shared, "no other place was written"


def test_what_is_no_number_does_not_enter_the_arena() -> None:
    qkv, ones = torch.full((1, 3 * 64), torch.nan), torch.ones(16, 32)
    keys, values = torch.ones(2, 1, 1, 16, 64)
    torch.ops.serve_app.rope_store(
        qkv, None, 1, ones, ones, None, None, 1e-6, torch.tensor([0]), torch.tensor([3]), keys, values
    )
    assert not keys[0, 0, 3].any()
    assert not values[0, 0, 3].any()


@every_type
@pytest.mark.parametrize("arena", [FLOAT, BFLOAT])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 40])
def test_attend(dtype: torch.dtype, arena: torch.dtype, group: int, window: int) -> None:
    """Rows of several lengths, with what earlier owners left behind their ends."""
    shared, dim, length = 2, 64, 64
    heads, ends = shared * group, [1, 16, 17, 33, 64]
    keys, values = noise(2, 5, shared, length, dim, dtype=arena, seed=1)
    qkv = noise(5, (heads + 2 * shared) * dim, dtype=dtype)
    slots, positions = torch.tensor([3, 0, 4, 1, 2]), torch.tensor(ends) - 1
    out = torch.empty(5, heads * dim, dtype=dtype)
    torch.ops.serve_app.attend(qkv, heads, 0.125, window, slots, positions, keys, values, out, None)
    for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        seen = slice(max(0, end - window) if window else 0, end)
        k, v = (t[slot, :, seen].double().repeat_interleave(group, 0) for t in (keys, values))
        query = qkv[row, : heads * dim].double().view(heads, 1, dim)
        weights = (query @ k.transpose(1, 2) * 0.125).softmax(-1)
        assert close(out[row], (weights @ v).reshape(-1))


def test_a_row_is_the_same_alone_and_in_any_company() -> None:
    keys, values = noise(2, 8, 3, 128, 64, dtype=BFLOAT, seed=1)
    qkv, slots, positions = (
        noise(8, 15 * 64, dtype=BFLOAT),
        torch.arange(8),
        torch.tensor([5, 99, 1, 127, 0, 50, 64, 9]),
    )
    out = torch.empty(8, 9 * 64, dtype=BFLOAT)
    torch.ops.serve_app.attend(qkv, 9, 0.125, 0, slots, positions, keys, values, out, None)
    for row in range(8):
        alone, one = torch.empty(1, 9 * 64, dtype=BFLOAT), slice(row, row + 1)
        torch.ops.serve_app.attend(qkv[one], 9, 0.125, 0, slots[one], positions[one], keys, values, alone, None)
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("rows", [1, 4, 130])
def test_scaled_rows_are_the_same_rows_and_their_multipliers_undo_it(rows: int) -> None:
    """For int8: what comes in is multiplied, what goes out lies in [-1, 1], and a last row pins the scale."""
    x, y, scale = noise(rows, 96), noise(rows + 1, 96, seed=1), noise(rows, seed=2).abs()
    weight, out, left = noise(96, seed=3), torch.empty(rows + 1, 96), torch.empty(rows)
    plain, sum_ = torch.empty(rows, 96), (x + y[:-1] * scale[:, None]).clone()
    torch.ops.serve_app.add_norm(sum_, None, None, weight, 1e-5, plain, None)
    torch.ops.serve_app.add_norm(x, y, scale, weight, 1e-5, out, left)
    assert_scaled(out, left, plain)

    gate_up, half, plain = noise(rows + 1, 96, seed=4), torch.empty(rows + 1, 48), torch.empty(rows, 48)
    torch.ops.serve_app.silu_mul((gate_up[:-1] * scale[:, None]).contiguous(), None, plain, None)
    torch.ops.serve_app.silu_mul(gate_up, scale, half, left)
    assert_scaled(half, left, plain)

    keys, values = noise(2, rows, 1, 16, 64, seed=5)
    place = torch.arange(rows), torch.full((rows,), 3)
    qkv, out, plain = noise(rows + 1, 4 * 64, seed=6), torch.empty(rows + 1, 128), torch.empty(rows, 128)
    torch.ops.serve_app.attend(qkv[:-1].contiguous(), 2, 0.125, 0, *place, keys, values, plain, None)
    torch.ops.serve_app.attend(qkv, 2, 0.125, 0, *place, keys, values, out, left)
    assert_scaled(out, left, plain)


def assert_scaled(out: torch.Tensor, multipliers: torch.Tensor, plain: torch.Tensor) -> None:
    assert torch.allclose(out[:-1].abs().amax(-1), torch.ones(len(plain)), rtol=1e-6)
    assert out.abs().max() == 1, "an ulp above would move the scale of the whole call"
    assert close(out[:-1] * multipliers[:, None], plain.double())
    assert out[-1].tolist() == [-1.0, 1.0] * (out.shape[1] // 2)


@every_type
@pytest.mark.parametrize("width", [1, 15, 16, 1000])
def test_the_largest_of_every_row(dtype: torch.dtype, width: int) -> None:
    rows = (noise(40, width, dtype=dtype) * 4).round()  # so that many are equally large
    rows[1, width // 2], rows[2, width - 1], rows[3] = torch.inf, -torch.inf, -torch.inf
    rows[4, width // 2] = torch.nan
    values, places = torch.ops.serve_app.largest_of_rows(rows)
    assert values[4].isnan()
    whole = [row for row in range(40) if row != 4]
    assert torch.equal(values[whole], rows[whole].float().amax(-1))
    assert torch.equal(places[whole], rows[whole].float().eq(values[whole][:, None]).int().argmax(-1))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@every_type
@pytest.mark.parametrize("family", tiny.LEAN)
def test_the_loop_over_the_layers_is_the_one_in_python(
    family: str, dtype: torch.dtype, quantization: Quantization, tmp_path: Path
) -> None:
    """Bit for bit, for decoding rows and chunks in one step, also where nothing is to be sampled."""
    folder = tiny.save(family, tmp_path, tiny.LEAN)
    name = {FLOAT: "float32", BFLOAT: "bfloat16"}[dtype]
    config = model_config(folder, max_running=4, max_context=64)
    config = config.model_copy(update={"quantization": quantization, "dtype": name})
    runner = TorchRunner.from_config(config, lambda stage: None)
    model = runner._model
    assert isinstance(model, LeanModel)
    assert model._native is not None
    answers = []
    with torch.inference_mode():
        for native in (model._native, None):
            model._native = native
            for wanted in ([], [2, 6]):
                rows = Rows([5, 6, 7, 8, 9, 10, 11], [0, 2, 3, 3, 3, 3, 3], [0, 0, 0, 1, 2, 3, 4], wanted, [], [])
                answers.append(model.forward(rows).logits)
    assert torch.equal(answers[1], answers[3])
    assert len(answers[0]) == len(answers[2]) == 0


def test_rows_outside_the_arena_are_refused() -> None:
    keys, values = torch.zeros(2, 1, 1, 16, 64)
    qkv, ones = torch.zeros(1, 3 * 64), torch.ones(16, 32)
    for slot, position in ((1, 0), (0, 16), (-1, 0), (0, -1)):
        place = torch.tensor([slot]), torch.tensor([position])
        with pytest.raises(RuntimeError, match="outside the arena"):
            torch.ops.serve_app.rope_store(qkv, None, 1, ones, ones, None, None, 1e-6, *place, keys, values)


BUILD = """
import sys
from pathlib import Path
from serve_app.engines.native import kernels
print(kernels._built(lambda stage: print(stage, flush=True), Path(sys.argv[1])))
"""


def test_two_that_want_them_at_once_build_them_once(tmp_path: Path) -> None:
    calls, compiler, root = tmp_path / "calls", tmp_path / "compiler", tmp_path / "built"
    compiler.write_text(f'#!/bin/sh\necho called >> {calls}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    command, environment = [sys.executable, "-c", BUILD, str(root)], {**os.environ, "CXX": str(compiler)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=240)[0].splitlines() for process in both]
    assert calls.read_text().splitlines() == ["called"]
    assert said[0] == said[1]
    assert said[0][0] == "compiling for this processor (once)"
    assert [path.suffix for path in sorted(root.iterdir())] == [".so", ".lock"]


def test_they_are_built_beside_other_work(tmp_path: Path) -> None:
    program = (
        "import torch, time; from serve_app.engine import kernels;"
        "kernels.begin(); time.sleep(0.5); said = [];"
        "assert kernels.available(said.append); assert kernels.available(said.append);"
        "print(said, hasattr(torch.ops.serve_app, 'attend'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['compiling for this processor (once)'] True"
    assert len(list(tmp_path.rglob("*.so"))) == 1


@pytest.mark.parametrize("setting", [{"CXX": "no-such-compiler"}, {"CXX": "false"}, {"SERVE_APP_NATIVE_KERNELS": "0"}])
def test_without_them_the_model_runs_all_the_same(setting: dict[str, str], tmp_path: Path) -> None:
    program = (
        "import sys; from tests.models import tiny; from tests.models.crowd import model_config;"
        "from pathlib import Path; from serve_app.engines.native.runner import TorchRunner; f = Path(sys.argv[1]);"
        "print(TorchRunner.from_config(model_config(tiny.save('llama', f, tiny.LEAN)), lambda s: None).kind)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **setting}
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "packed"
    assert "native kernels are not used, steps are slower" in done.stderr
