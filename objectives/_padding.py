"""Where the tokens of a padded batch are, whichever side the padding is on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from objectives._fit import takes_the_last_position
from objectives._model import Batch
from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.joint.row_blocks import blocks


def token_mask(batch: Batch) -> Tensor:
    """True where there is a token, (b, t)."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def last_positions(mask: Tensor) -> Tensor:
    """Index of the last token of each row, (b,)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def in_rows(values: Tensor, places: Tensor, fill: float) -> Tensor:
    """The values of the tokens at ``places`` (n,) put there, (b, t), and ``fill`` elsewhere."""
    # Not index_add: its order, and so the last bit, differs from call to call on a GPU.
    return values.new_full(places.shape, fill).masked_scatter(places, values)


def right_padded(batch: Batch) -> Batch:
    """The same texts, each from the first position on, where padding is on the left.

    A model with absolute positions would read a short text as one that begins late; and peft's
    virtual tokens stand before the padding, so that their distance to the text would be the
    neighbours' affair.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return batch
    # To look would wait for a GPU; there a batch that needs no move is moved by nothing.
    if not mask.is_cuda and bool(mask[:, 0].all()):
        return batch
    rows, length = mask.shape
    first = mask.long().argmax(1, keepdim=True)
    places = (torch.arange(length, device=mask.device) + first) % length
    at = torch.arange(rows, device=mask.device)[:, None], places
    return {
        name: value[at] if value.shape[:2] == mask.shape else value for name, value in batch.items()
    }


def of_whole_texts(model: nn.Module, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
    """What ``run`` gives for every row, also by a model that would read the end of the padding.

    A decoder with a classifier's head finds the end of a text by its tokens, and is not shown them
    where peft puts virtual tokens before: it takes the last position. So texts of one length are
    run at a time there.
    """
    if "attention_mask" not in batch or not takes_the_last_position(model):
        return run(batch)
    batch = right_padded(batch)
    mask = token_mask(batch)
    lengths = mask.sum(1).tolist()
    if set(lengths) == {mask.shape[1]}:
        return run(batch)
    if blocks().count > 1:
        raise NotJoint("texts behind virtual tokens are classified one length at a time")
    found: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        part = {n: v[rows] if len(v) == len(lengths) else v for n, v in batch.items()}
        cut = {n: v[:, :length] if v.shape[1:2] == mask.shape[1:] else v for n, v in part.items()}
        found |= zip(rows, run(cut), strict=True)
    return torch.stack([found[row] for row in range(len(lengths))])
