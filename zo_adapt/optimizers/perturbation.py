"""The perturbation scale mu: the usual one, and the smallest that rounding does not swallow."""

import math

import torch

from zo_adapt.errors import PerturbationError
from zo_adapt.view.parameters import ParameterView

SHARE, STEP_LIKE_SHARE = 1 / 25, 1 / 2.5
"""Of the way that a run goes: what a difference spans, on a smooth objective and on a count."""


def usual_perturbation(displacement: float, finest: float, step_like: bool) -> float:
    """The mu of a run that is given none.

    Ten times as far for a count: of LoRA on texts, 20,000 queries, two seeds, from base points, the
    accuracy at 1, 3, 10 and 20 times the scale for a loss was 0.22, 0.33, 0.38 and 0.34 tuned by
    the hard count, and 0.24, 0.26, 0.31 and 0.29 by macro-F1 (benchmarks/accuracy.py has these
    scales as methods).

    Args:
        displacement: How far a weight may go over the run, in the parameters' units.
        finest: The smallest mu that the dtype resolves.
        step_like: Whether the objective changes in jumps.
    """
    share = STEP_LIKE_SHARE if step_like else SHARE
    return max(share * displacement, 4 * finest)


def finest_perturbation(view: ParameterView) -> float:
    """The mu that half of the view's scalars resolve.

    A scalar resolves mu if half a unit in the last place, at its tensor's root mean square, is not
    larger than mu times its group's factor.

    Raises:
        ViewError: The weights are not finite.
    """
    # Once: a norm reads the whole tensor, and a view may be a whole model.
    tensors = sorted(_finest(view))
    seen, half = 0, sum(numel for _, numel in tensors) / 2
    for smallest, numel in tensors:
        seen += numel
        if seen >= half:
            return smallest
    return 0.0


def check_resolution(view: ParameterView, perturbation_scale: float, finest: float) -> None:
    """Refuse a perturbation that rounding would swallow in most of the view.

    Args:
        view: Named in the message.
        perturbation_scale: mu.
        finest: What ``finest_perturbation`` gave for the view.

    Raises:
        PerturbationError: Names the smallest usable mu.
    """
    if perturbation_scale < finest:
        dtypes = sorted({str(tensor.dtype) for tensor in view.tensors.values()})
        raise PerturbationError(
            f"perturbation_scale={perturbation_scale:.3g} is below the resolution of most of the "
            f"view ({', '.join(dtypes)}); choose at least {finest:.3g}, or float32 tensors"
        )


def _finest(view: ParameterView) -> list[tuple[float, int]]:
    """Smallest usable mu and number of scalars of every tensor that is perturbed."""
    rows, norms = [], view.norms()
    for name, tensor in view.tensors.items():
        factor = view.group_of(name).perturbation_scale
        if factor > 0:
            rms = norms[name] / math.sqrt(tensor.numel())
            rows.append((0.5 * torch.finfo(tensor.dtype).eps * rms / factor, tensor.numel()))
    return rows
