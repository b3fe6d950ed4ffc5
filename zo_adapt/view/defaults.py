"""What a view assumes before anything is measured: how far its parts may go, and which rest.

Measured on LoRA and new heads (benchmarks/accuracy.py): zero-initialised and new weights may travel
0.25 over a run; LoRA's A must not, for it multiplies B and soon makes all the noise (BBC topics
after 7,680 queries, two seeds: 0.59 with A at rest as in LoRA-FA, arXiv 2308.03303, 0.20 with A
moving as far as B). Pretrained weights may travel a tenth of their root mean square.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from zo_adapt.errors import OptionError
from zo_adapt.noise.coordinates import Coordinates
from zo_adapt.noise.distributions import Noise, noise_named
from zo_adapt.view.adapters import resting_factors
from zo_adapt.view.group import DISPLACEMENT, Group
from zo_adapt.view.newness import new_names
from zo_adapt.view.shards import Shards
from zo_adapt.view.tensors import norms

PRETRAINED_SHARE = 0.1
"""Displacement of a pretrained weight as a share of the view's root mean square."""


def displacement_and_groups(
    tensors: Mapping[str, Tensor], model: nn.Module | None, shards: Shards
) -> tuple[float, tuple[Group, ...]]:
    """The displacement that suits a view, and the groups that differ from it.

    Args:
        tensors: The view.
        model: Its model; None for plain tensors, of which nothing is known.
        shards: Of the view.
    """
    if model is None:
        return DISPLACEMENT, ()
    new = new_names(model) & set(tensors)
    pretrained = {name: tensor for name, tensor in tensors.items() if name not in new}
    rest = resting_factors(model) & set(tensors)
    groups = (
        (Group(names=sorted(rest), perturbation_scale=0.0),)
        if rest and rest != set(tensors)
        else ()
    )
    if not pretrained:
        return DISPLACEMENT, groups
    displacement = PRETRAINED_SHARE * _root_mean_square(pretrained, shards)
    further = (new - rest) if displacement > 0 else set()
    if not further:
        return displacement or DISPLACEMENT, groups
    stretch = DISPLACEMENT / displacement
    # A weight that is to go s times as far is perturbed s times as much at s^2 times the rate.
    new_parts = Group(names=sorted(further), lr=stretch**2, perturbation_scale=stretch)
    return displacement, (*groups, new_parts)


def noise_over(
    name: str, tensors: Mapping[str, Tensor], groups: Mapping[str, Group], *, copies: bool
) -> Noise:
    """The noise of a view, by name.

    Args:
        name: Short or versioned.
        tensors: The view.
        groups: That of each tensor: coordinates of what does not move are none.
        copies: Whether the view is shifted by way of a copy.

    Raises:
        OptionError: No such noise, or one that is not for such a view.
    """
    noise = noise_named(name)
    if not isinstance(noise, Coordinates):
        return noise
    if not copies:
        raise OptionError(
            "noise='coordinates' is for small views, which are copied to be shifted; not with "
            "scratch='layer', nor a model that lies in parts on several processes: choose "
            "'gaussian'"
        )
    moving = {
        name: tensor.numel()
        for name, tensor in tensors.items()
        if groups[name].lr * groups[name].perturbation_scale > 0
    }
    return noise.over(moving)


def _root_mean_square(tensors: Mapping[str, Tensor], shards: Shards) -> float:
    """To three digits: it becomes part of the view's fingerprint, the same on every device."""
    found = norms(tensors, shards).values()
    numel = sum(tensor.numel() for tensor in tensors.values())
    return float(f"{math.hypot(*found) / math.sqrt(numel):.3g}")
