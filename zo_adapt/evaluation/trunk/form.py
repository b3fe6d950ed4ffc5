"""How an objective calls its model: which of a batch's tensors it hands on, and what beside them.

What is known of a batch's rows is then known without running anything.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_adapt.evaluation.trunk.call import Call
from zo_adapt.evaluation.trunk.parts import tensors_of


class Named(NamedTuple):
    """Stands for a tensor of a batch."""

    name: str


class Form(NamedTuple):
    """How a function of batches of one signature calls the model.

    Args:
        model: What it calls it with; ``Named`` for the batch's tensors.
        width: Positions that enter the first tuned layer.
        device: Where they do.
    """

    model: Mapping[str, Any]
    width: int
    device: torch.device

    def arguments(self, content: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model is called with for a batch."""
        return {
            argument: content[value.name] if isinstance(value, Named) else value
            for argument, value in self.model.items()
        }


def form_of(content: Mapping[str, Tensor], call: Call) -> Form | None:
    """The form of a call that was answered; None where the batch does not say it.

    Args:
        content: The batch.
        call: The one call of the model.
    """
    names = {id(tensor): name for name, tensor in content.items()}
    if len(names) < len(content) or call.entry is None:
        return None  # of two names for one tensor, either may be the one that is read
    model: dict[str, Any] = {}
    for argument, value in call.arguments.items():
        if id(value) in names:
            model[argument] = Named(names[id(value)])
        elif any(True for _ in tensors_of(value)):
            return None
        else:
            model[argument] = value
    return Form(model, *call.entry)
