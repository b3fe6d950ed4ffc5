"""One call of a cut model, what was seen of it, and how an objective makes such calls.

Where it is known which of a batch's tensors the objective hands on, and what beside them, rows are
known without running anything.
"""

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_adapt.evaluation.trunk.keys import Rows, tensors_of


class Call:
    """One call of the model: answered from the store, or run and recorded.

    Args:
        rows: Its rows; None where the layers run as they are.
        served: Whether all its rows are in the store.
        making: Whether it runs for the sake of its activations alone.
        is_new: Whether some of its rows had to be made first.
        watched: Note what enters the tuned blocks, too.
        arguments: What the model is called with, by position or name.

    Attributes:
        entry: Where it is served: how many positions enter the first tuned block, and on what
            device.
    """

    def __init__(
        self,
        rows: Rows | None,
        served: bool,
        watched: bool,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        making: bool = False,
    ) -> None:
        self.rows, self.served, self.watched = rows, served, watched
        self.making, self.is_new = making, False
        self.arguments = arguments
        self.entry: tuple[int, torch.device] | None = None
        self.order: list[int] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.entering: Tensor | None = None
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.early: set[str] = set()
        self.late: set[str] = set()

    @property
    def kind(self) -> str:
        """What has to be checked once before it is believed."""
        return kind_of(self.rows)


def kind_of(rows: Rows | None) -> str:
    """Rows cut to their length have to be checked apart from whole ones."""
    return "padded rows" if rows is not None and rows.padded else "whole rows"


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
    """The form of a call that was answered; None where the batch does not say it."""
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
