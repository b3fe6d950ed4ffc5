"""Where the tokens of a padded batch are, whichever side the padding is on."""

import torch
from torch import Tensor

from objectives._model import Batch


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


def with_positions(batch: Batch, accepted: frozenset[str] | None) -> Batch:
    """Positions counted from the first token, as ``generate`` does, where padding is on the left.

    Without them a model with absolute positions would read a short text as one that begins late.
    """
    takes_positions = accepted is not None and "position_ids" in accepted
    if not takes_positions or "position_ids" in batch or "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"]
    if bool(mask[:, 0].all()):
        return batch
    return batch | {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
