"""What a model's linear layers read, seen on one short text; quantisation spends its digits by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq

import torch
from transformers import PreTrainedModel

# Which channels are large hardly depends on the text.
TEXT = (
    "Query: A train leaves at 9:40 and arrives at 12:05. How long is the journey?\nAnswer: 2 hours 25 minutes.\n\n"
    "def area(width, height):\n    return width * height\n\nThe river froze in January, and by the end of the "
    "people crossed it on foot. «Wie weit ist es noch?», fragte sie; nobody answered. Dear Sir or Madam, thank you "
    "for your letter of 3 May. 1. Mix the flour with two eggs. 2. Add 250 ml of milk."
)

Statistic = Callable[[torch.Tensor], torch.Tensor]


def inputs(model: PreTrainedModel, ids: Seq[int], statistic: Statistic) -> dict[torch.nn.Module, torch.Tensor]:
    """`statistic` of the float32 rows `[N, K]` that each linear layer reads of `ids`; of those that read any."""
    seen: dict[torch.nn.Module, torch.Tensor] = {}

    def look(module: torch.nn.Module, read: tuple[torch.Tensor, ...], _: object) -> None:
        if read[0].numel():
            seen[module] = statistic(read[0].detach().float().flatten(0, -2))

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [linear.register_forward_hook(look) for linear in linears]
    model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def largest(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of every channel `[K]`."""
    return rows.abs().amax(0)


def importance(rows: torch.Tensor) -> torch.Tensor:
    """How much an error in a weight costs, by channel `[K]`: the mean square of what it is multiplied with."""
    return rows.square().mean(0)
