"""The smallest perturbation that rounding to a tensor's dtype does not swallow."""

import math

import torch

from zo_adapt.errors import PerturbationError
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.tensors import norm


def finest_perturbation(view: ParameterView) -> float:
    """The mu that half of the view's scalars resolve.

    A scalar resolves mu if half a unit in the last place, at its tensor's root mean square, is not
    larger than mu times its group's factor.
    """
    seen, half = 0, sum(numel for _, numel in _finest(view)) / 2
    for smallest, numel in sorted(_finest(view)):
        seen += numel
        if seen >= half:
            return smallest
    return 0.0


def check_resolution(view: ParameterView, perturbation_scale: float) -> None:
    """Refuse a perturbation that rounding would swallow in most of the view.

    Raises:
        PerturbationError: Names the smallest usable mu.
    """
    finest = finest_perturbation(view)
    if perturbation_scale < finest:
        dtypes = sorted({str(tensor.dtype) for tensor in view.tensors.values()})
        raise PerturbationError(
            f"perturbation_scale={perturbation_scale:.3g} is below the resolution of most of the "
            f"view ({', '.join(dtypes)}); choose at least {finest:.3g}, or float32 tensors"
        )


def _finest(view: ParameterView) -> list[tuple[float, int]]:
    """Smallest usable mu and number of scalars of every tensor that is perturbed."""
    rows = []
    for name, tensor in view.tensors.items():
        factor = view.group_of(name).perturbation_scale
        rms = norm(tensor) / math.sqrt(tensor.numel())
        if factor > 0:
            rows.append((0.5 * torch.finfo(tensor.dtype).eps * rms / factor, tensor.numel()))
    return rows
