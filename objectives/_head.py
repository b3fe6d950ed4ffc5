"""Logits of a few positions and a few tokens, without computing the others.

While the model runs, the forward of its output embedding is replaced by one that keeps the chosen
positions and multiplies by the chosen rows of the weight alone. What the model does before (MLM
transforms, projections) and after (scaling, soft-capping) is its own code, so nothing is left out
and no architecture has to be known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives._model import at_least_float32
from objectives._shared import apart
from zo_adapt.evaluation.model_state import replaced_forwards

Select = Callable[[Tensor], Tensor]
"""(b, t, width) -> (a, c, width): the positions wanted, of hidden states or of logits."""


def narrow_logits(
    model: nn.Module, forward: Callable[[], Tensor], select: Select, rows: Tensor | None = None
) -> Tensor:
    """Logits at the selected positions, of the tokens ``rows`` (None: of the whole vocabulary).

    Args:
        model: The model that ``forward`` runs.
        forward: Runs it and returns its logits.
        select: Picks the positions.
        rows: Token ids of shape (r,).

    Returns:
        What ``select`` leaves, (a, c, r).
    """
    head = output_embedding(model)
    if head is None:
        return _columns(select(forward()), rows)
    with _narrowed(head, select, rows) as calls, apart():
        logits = forward()
    # A model that computes its logits by another way than its output embedding returns them all.
    return logits if calls else _columns(select(logits), rows)


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _narrowed(head: nn.Module, select: Select, rows: Tensor | None) -> Iterator[list[None]]:
    original = head.forward
    # Only a plain layer is known to be weight and bias; a LoRA, quantised or offloaded one runs as
    # it is, at the selected positions. The weight is read at the call: that is where it is shifted.
    # (accelerate puts a forward of its own on the instance.)
    plain = type(head) is nn.Linear and "forward" not in head.__dict__
    calls: list[None] = []
    # Of a head at several points at once, which must know whose rows are left.
    at_selected = getattr(original, "at_selected", None)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if rows is not None and plain:
            return _linear(select(hidden), head, rows)
        if at_selected is not None:
            return _columns(at_selected(hidden, select), rows)
        return _columns(original(select(hidden), *args, **kwargs), rows)

    with replaced_forwards({head: forward}):
        yield calls


def _linear(hidden: Tensor, head: nn.Module, rows: Tensor) -> Tensor:
    """A few rows in fp32: the logits of a half-precision model would be rounded to 8 or 11 bits."""
    weight, bias = head.weight, head.bias
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(
            at_least_float32(hidden),
            at_least_float32(weight[rows]),  # type: ignore[index]
            None if bias is None else at_least_float32(bias[rows]),  # type: ignore[index]
        )


def _columns(logits: Tensor, rows: Tensor | None) -> Tensor:
    return logits if rows is None else logits[..., rows]
