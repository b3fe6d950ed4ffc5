"""One call of a cut model, and what was seen of it."""

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zo_adapt.evaluation.trunk.keys import Rows


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
