"""Where a model is cut below the first tuned layer. Nothing is known of any model: the layers are
its list of repeated blocks, and the cut lies before the first that holds a tensor of the view.
"""

from typing import NamedTuple

from torch import Tensor, nn

from zo_adapt.errors import ViewError
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
