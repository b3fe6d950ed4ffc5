"""Groups: parts of a view with their own learning rate and perturbation scale."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from zo_adapt.errors import OptionError
from zo_adapt.view.selection import names_matching

REACH = 0.25
"""How far a weight may go in a run where nothing is known of it: measured on LoRA and new heads."""


class Group(NamedTuple):
    """A part of a view with its own step, as in torch.optim's parameter groups.

    Both numbers multiply what the optimizer uses for the rest of the view.

    Args:
        pattern: Regular expression over the names of the view's tensors.
        lr: Factor on the learning rate.
        perturbation_scale: Factor on the perturbation; 0 leaves the part at rest.

    Example:
        >>> Group(r"classifier", lr=10.0)
        Group(pattern='classifier', lr=10.0, perturbation_scale=1.0)
    """

    pattern: str
    lr: float = 1.0
    perturbation_scale: float = 1.0


def exactly(names: Iterable[str], lr: float = 1.0, perturbation_scale: float = 1.0) -> Group:
    """A group of just these tensors."""
    return Group(f"^({'|'.join(map(re.escape, sorted(names)))})$", lr, perturbation_scale)


def assign_groups(
    names: list[str], groups: Sequence[Group]
) -> tuple[tuple[Group, ...], dict[str, int]]:
    """The groups, that of the rest last, and the group index of every tensor.

    Raises:
        NoMatchingParameterError: A pattern matches nothing.
        OptionError: A factor outside its range.
    """
    if not groups:
        return (Group(""),), dict.fromkeys(names, 0)
    index: dict[str, int] = {}
    for position, group in enumerate(groups):
        if not (group.lr >= 0 and group.perturbation_scale >= 0):
            raise OptionError(f"{group}: lr must be >= 0 and perturbation_scale >= 0")
        for name in names_matching(names, group.pattern):
            index.setdefault(name, position)
    rest = len(groups)
    return (*groups, Group("")), {name: index.get(name, rest) for name in names}
