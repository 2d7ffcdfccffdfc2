"""LoRA adapters of a model: their weights in the layout of the native operation, and the same product by torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass
from itertools import count

import torch
from safetensors.torch import load

from serve_app.engines.files.adapter_files import PREFIX, AdapterFiles
from serve_app.engines.native.rows import AdapterRows
from serve_app.errors import InvalidRequest

# Outputs whose weights are stored together, for one register of the native operation.
STRIP = 16
_ALIGNMENT = 64  # elements; a strip begins at a cache line
_FIELD = "lora_path"


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that adapters can change: its number, its sizes, and how `smooth` rescaled its channels.

    `input_scale` `[inputs]` multiplied its weights and `output_scale` `[outputs]` divided them; None where it did not.
    """

    number: int
    inputs: int
    outputs: int
    input_scale: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The weights of one adapter in one buffer.

    `table` `[numbers, 4]` has, for the number of each layer, the rank r, where A `[r, inputs]` and the strips of B
    `[outputs / STRIP, r, STRIP]` begin in `data`, and where their `r` multipliers begin in `scales`; r is 0 for a layer
    that the adapter does not change. B includes the scaling of the adapter. With int8 weights, row j of A times column
    j of B must be multiplied by the multiplier j; the other types have multipliers of 1.
    """

    data: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    entries: tuple[tuple[int, int, int, int], ...]

    def factors(self, target: Target) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A `[r, inputs]` and B transposed `[r, outputs]`; None for a layer that the adapter does not change.

        For weights that are not int8.
        """
        rank, first, second, _ = self.entries[target.number]
        if not rank:
            return None
        strips = -(-target.outputs // STRIP)
        a = self.data[first : first + rank * target.inputs].view(rank, target.inputs)
        b = self.data[second : second + strips * rank * STRIP].view(strips, rank, STRIP)
        return a, b.transpose(0, 1).reshape(rank, -1)[:, : target.outputs]


@dataclass(frozen=True, slots=True)
class RowGroups:
    """The rows of a step that use adapters: those of `adapters[i]` are `rows[starts[i] : starts[i + 1]]`, ascending."""

    adapters: list[LoraWeights]
    rows: torch.Tensor
    starts: list[int]

    @classmethod
    def of(cls, groups: Iterable[AdapterRows], device: torch.device | str = "cpu") -> RowGroups:
        adapters, rows, starts = [], list[int](), [0]
        for group in groups:
            assert isinstance(group.weights, LoraWeights)
            adapters.append(group.weights)
            rows += sorted(group.rows)
            starts.append(len(rows))
        return cls(adapters, torch.tensor(rows, dtype=torch.long, device=device), starts)


def make_weights(
    files: AdapterFiles, targets: Mapping[str, Target], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LoraWeights:
    """The weights of an adapter for the layers `targets`, by their names. Raises InvalidRequest if they do not fit.

    `dtype` is a floating-point type, or int8.
    """
    try:
        tensors = load(files.weights)
    except Exception:  # noqa: BLE001 - a parser may raise any exception for a damaged file
        raise InvalidRequest("adapter_model.safetensors cannot be read.", param=_FIELD) from None
    pieces: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    entries = [(0, 0, 0, 0)] * (1 + max((target.number for target in targets.values()), default=-1))
    length = ranks = 0
    for name, (a, b) in _pairs(tensors).items():
        target = targets.get(name)
        if target is None:
            raise InvalidRequest(f"The adapter changes {name}, which is no layer that this model adapts.", _FIELD)
        rank = len(a)
        _check_shapes(name, target, files.settings.rank_of(name), a, b)
        down, up = _rescaled(target, a.float(), b.float() * files.settings.scaling(name))
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise InvalidRequest("The adapter has weights that are no finite numbers.", param=_FIELD)
        down, up, scale = _rounded(down, up, dtype)
        strips = torch.nn.functional.pad(up, (0, 0, 0, -target.outputs % STRIP)).view(-1, STRIP, rank)
        begins = []
        for part in (down.flatten(), strips.transpose(1, 2).flatten()):
            begins.append(length)
            pieces += [part, part.new_zeros(-len(part) % _ALIGNMENT)]
            length += len(part) + len(pieces[-1])
        entries[target.number] = (rank, begins[0], begins[1], ranks)
        scales.append(scale)
        ranks += rank
    if not pieces:
        raise InvalidRequest("The adapter has no weights.", param=_FIELD)
    return LoraWeights(torch.cat(pieces).to(device), torch.cat(scales), torch.tensor(entries), tuple(entries))


def add_lora(y: torch.Tensor, x: torch.Tensor, groups: RowGroups, target: Target) -> None:
    """Add to the rows `[N, outputs]` of a layer's result what the adapters of its input rows `[N, inputs]` add."""
    for adapter, first, last in zip(groups.adapters, groups.starts, groups.starts[1:], strict=False):
        factors = adapter.factors(target)
        if factors is not None:
            rows = groups.rows[first:last]
            a, b = factors
            y.index_add_(0, rows, (x[rows].to(a.dtype) @ a.T @ b).to(y.dtype))


def _pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer, by its name in the model."""
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    expected = {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if other := sorted(expected ^ tensors.keys()):
        raise InvalidRequest(
            f"The adapter lacks, or has in addition, weights that are not supported: {', '.join(other[:3])}.", _FIELD
        )
    return {
        name.removeprefix(PREFIX): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in sorted(names)
    }


def _check_shapes(name: str, target: Target, rank: int, a: torch.Tensor, b: torch.Tensor) -> None:
    found, expected = [tuple(a.shape), tuple(b.shape)], [(rank, target.inputs), (target.outputs, rank)]
    if found != expected:
        raise InvalidRequest(
            f"The weights of {name} have the shapes {found[0]} and {found[1]}; this model needs {expected[0]} and "
            f"{expected[1]}. The adapter was made for another model.",
            param=_FIELD,
        )


def _rescaled(target: Target, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B for the channels as `smooth` rescaled them."""
    if target.input_scale is not None:
        a = a * target.input_scale
    return a, b if target.output_scale is None else b / target.output_scale[:, None]


def _rounded(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A and B in this type, and the multipliers `[r]` of their products."""
    if dtype != torch.int8:
        return a.to(dtype), b.to(dtype), torch.ones(len(a))
    of_a = (a.abs().amax(1) / 127).clamp_min(1e-20)
    of_b = (b.abs().amax(0) / 127).clamp_min(1e-20)
    return (a / of_a[:, None]).round_().to(dtype), (b / of_b).round_().to(dtype), of_a * of_b


def targets_of(
    linears: Iterable[tuple[str, torch.nn.Module]], numbers: Iterable[int] | None = None
) -> dict[str, Target]:
    """The layers by name, with these numbers, by default in their order. Call it before their weights are packed."""
    return {
        name: Target(
            number,
            int(linear.in_features),  # type: ignore[arg-type]
            int(linear.out_features),  # type: ignore[arg-type]
            getattr(linear, "serve_app_input_scale", None),
            getattr(linear, "serve_app_output_scale", None),
        )
        for number, (name, linear) in zip(count() if numbers is None else numbers, linears, strict=False)
    }


def wanted_groups(groups: Seq[AdapterRows], wanted: Seq[int]) -> list[AdapterRows]:
    """The groups of the rows `wanted` of a step, counted within `wanted`."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(wanted):
        places.setdefault(row, []).append(place)
    found = [AdapterRows(group.weights, [p for row in group.rows for p in places.get(row, ())]) for group in groups]
    return [group for group in found if group.rows]
