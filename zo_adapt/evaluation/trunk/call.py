"""Where a model is cut below the first tuned layer, and one call of a cut model.

Nothing is known of any model: the layers are its list of repeated blocks, and the cut lies before
the first that holds a tensor of the view. Of a call it is seen how an objective makes it: where it
is known which of a batch's tensors it hands on, and what beside them, rows are known without
running anything.
"""

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_adapt.errors import ViewError
from zo_adapt.evaluation.trunk.keys import Rows, tensors_of
from zo_adapt.view.blocks import block_list
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.selection import owners
from zo_adapt.view.shards import WHY_SHARDED


class RefusedError(Exception):
    """Why the frozen layers cannot be reused; the message is the reason that users read."""


class Cut(NamedTuple):
    """A model cut in two.

    Args:
        path: Of the list of blocks.
        frozen: The blocks before the first tuned one, in order.
        tuned: The others.
        around: The modules that run the blocks, outermost first.
        after: Modules outside the blocks that hold tensors of the view, by path.
        kept: Parameters and buffers that the view leaves as they are.
    """

    path: str
    frozen: list[nn.Module]
    tuned: list[nn.Module]
    around: list[nn.Module]
    after: dict[str, nn.Module]
    kept: list[Tensor]


def cut(view: ParameterView) -> Cut:
    """Cut the model of a view.

    Raises:
        RefusedError: No model, no blocks, a tuned first block, tuned tensors before the blocks.
    """
    if view.model is None:
        raise RefusedError("the view has no model")
    if view.is_sharded:
        raise RefusedError(WHY_SHARDED)
    model = view.model
    try:
        path, blocks = block_list(model)
    except ViewError as error:
        raise RefusedError(str(error)) from error
    holds = view.inspection.holding()
    tuned = [any(map(holds, block.parameters())) for block in blocks]
    first = (*tuned, True).index(True)
    if first == 0:
        raise RefusedError(f"the view holds weights of the first of {len(blocks)} layers ({path})")
    steps = path.split(".")
    around = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps))]
    after = {
        name: module
        for name, module, _, parameter in owners(model)
        if holds(parameter) and not name.startswith(f"{path}.")
    }
    for name, module in after.items():
        if module in around:
            raise RefusedError(f"the view holds weights of {name!r}, which runs the layers")
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise RefusedError(f"{name or 'the model'!r} is compiled")
    kept = [t for t in (*model.parameters(), *model.buffers()) if not holds(t)]
    if any(t.is_meta for t in kept):
        raise RefusedError("weights of the model are offloaded, where no change can be noticed")
    if any(t.is_inference() for t in kept):
        raise RefusedError("the model was made in inference mode, where no change can be noticed")
    return Cut(path, list(blocks[:first]), list(blocks[first:]), around, after, kept)


def can_trim(model: nn.Module) -> bool:
    """Whether an attention mask is that of the layers: in an encoder-decoder it may not be."""
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


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
