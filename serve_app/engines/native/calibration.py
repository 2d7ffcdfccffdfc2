"""Statistics of the inputs of a model's linear layers on one short text. Quantization chooses scales by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq

import torch
from transformers import PreTrainedModel

# The set of large channels hardly depends on the text.
TEXT = (
    "Query: A train leaves at 9:40 and arrives at 12:05. How long is the journey?\nAnswer: 2 hours 25 minutes.\n\n"
    "def area(width, height):\n    return width * height\n\nThe river froze in January, and by the end of the "
    "people crossed it on foot. «Wie weit ist es noch?», fragte sie; nobody answered. Dear Sir or Madam, thank you "
    "for your letter of 3 May. 1. Mix the flour with two eggs. 2. Add 250 ml of milk."
)

Statistic = Callable[[torch.Tensor], torch.Tensor]


def input_statistics(
    model: PreTrainedModel, ids: Seq[int], statistic: Statistic
) -> dict[torch.nn.Module, torch.Tensor]:
    """`statistic` of the float32 inputs `[N, K]` of each linear layer in one pass over `ids`.

    A layer without input rows (an expert that no token was routed to) is left out.
    """
    statistics: dict[torch.nn.Module, torch.Tensor] = {}

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        if inputs[0].numel():
            statistics[module] = statistic(inputs[0].detach().float().flatten(0, -2))

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [linear.register_forward_hook(record) for linear in linears]
    model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return statistics


def max_magnitude(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel `[K]`."""
    return rows.abs().amax(0)


def mean_square(rows: torch.Tensor) -> torch.Tensor:
    """The mean square of each channel `[K]`: the factor by which an error in a weight of the channel counts."""
    return rows.square().mean(0)
