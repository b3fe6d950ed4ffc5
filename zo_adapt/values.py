"""What objectives return: brought over from a GPU at once, and checked."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError


class Returned(NamedTuple):
    """What the objective returned for the parts of one probe, and their numbers of rows."""

    values: list[Any]
    sizes: list[int]


def on_host(answers: list[Returned]) -> list[Returned]:
    """The same, tensors of a GPU brought over in one transfer: each one waits for the GPU."""
    there = [
        value
        for answer in answers
        for value in answer.values
        if isinstance(value, Tensor) and value.is_cuda and not value.requires_grad
    ]
    if len(there) < 2 or len({value.device for value in there}) > 1:
        return answers
    flat = torch.cat([value.flatten().to(torch.float64) for value in there]).cpu().numpy()
    here, start = {}, 0
    for value in there:
        stop = start + value.numel()
        here[id(value)] = flat[start:stop].reshape(value.shape)
        start = stop
    return [
        Returned([here.get(id(value), value) for value in answer.values], answer.sizes)
        for answer in answers
    ]


def checked_values(returned: Any, rows: int) -> np.ndarray:
    """What the objective returned, as float64 of shape () or (rows,).

    Raises:
        ObjectiveError: It requires grad, has another shape, or is not a number.
        NonFiniteObjectiveError: NaN or infinity.
    """
    if returned is None:
        raise ObjectiveError(
            "the objective returned NoneType; return a float or one per example (is the return "
            "statement missing?)"
        )
    if isinstance(returned, Tensor):
        if returned.requires_grad:
            raise ObjectiveError(
                "the objective returned a tensor that requires grad: it was computed outside "
                "no_grad, which costs memory; remove enable_grad(), or return .detach()"
            )
        returned = returned.to("cpu", torch.float64).numpy()
    try:
        values = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"the objective returned {type(returned).__name__}; return a float or one per example"
        ) from error
    if values.shape not in ((), (1,), (rows,)):
        raise ObjectiveError(
            f"the objective returned shape {values.shape} for {rows} examples; return a float "
            f"or shape ({rows},)"
        )
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(values)))
        raise NonFiniteObjectiveError(
            f"the objective returned {np.atleast_1d(values)[bad[0]]} for {len(bad)} of "
            f"{values.size} values; a smaller lr or perturbation_scale keeps it finite"
        )
    return values if values.shape == (rows,) else values.reshape(())
