"""Groups: parts of a view with their own learning rate and perturbation scale."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from zo_adapt.errors import ArgumentTypeError, OptionError
from zo_adapt.options import not_negative
from zo_adapt.view.selection import names_listed, names_matching

DISPLACEMENT = 0.25
"""How far a weight may go in a run where nothing is known of it: measured on LoRA and new heads."""


@dataclass(frozen=True, init=False, repr=False)
class Group:
    """A part of a view with its own step, as in torch.optim's parameter groups.

    Both numbers multiply what the optimizer uses for the rest of the view.

    Args:
        pattern: Regular expression that finds the names of the part's tensors (``re.search``).
        lr: Factor on the learning rate.
        perturbation_scale: Factor on the perturbation; 0 leaves the part at rest.
        decays: Whether weight decay reaches the part.
        names: The names themselves, instead of a pattern.

    Raises:
        OptionError: Neither a pattern nor names, or both; a factor that is no number >= 0.
        ArgumentTypeError: A pattern that is no string, names that are no list of them.

    Example:
        >>> Group(r"classifier", lr=10.0)
        Group('classifier', lr=10.0, perturbation_scale=1.0)
        >>> Group(names=["head.weight", "head.bias"], perturbation_scale=2.0)
        Group(names=['head.weight', 'head.bias'], lr=1.0, perturbation_scale=2.0)
    """

    pattern: str
    lr: float
    perturbation_scale: float
    decays: bool
    names: tuple[str, ...]

    def __init__(
        self,
        pattern: str | None = None,
        lr: float = 1.0,
        perturbation_scale: float = 1.0,
        decays: bool = True,
        *,
        names: Iterable[str] | None = None,
    ) -> None:
        listed = _listed(names)
        if (pattern is None) == (names is None):
            raise OptionError("a group needs either a pattern or names=[...]")
        if pattern is not None and not isinstance(pattern, str):
            raise ArgumentTypeError(
                f"pattern is a {type(pattern).__name__}; give a regular expression, or names=[...]"
            )
        if pattern is None:
            # Files and fingerprints know patterns alone: one that finds just these names.
            pattern = f"^({'|'.join(map(re.escape, sorted(listed)))})$"
        lr = not_negative("lr", lr)
        perturbation_scale = not_negative("perturbation_scale", perturbation_scale)
        for name, value in (
            ("pattern", pattern),
            ("lr", lr),
            ("perturbation_scale", perturbation_scale),
            ("decays", decays),
            ("names", listed),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        part = f"names={list(self.names)!r}" if self.names else repr(self.pattern)
        decays = "" if self.decays else ", decays=False"
        scale = f"perturbation_scale={self.perturbation_scale}"
        return f"Group({part}, lr={self.lr}, {scale}{decays})"

    def as_list(self) -> list[str | float]:
        """``[pattern, lr, perturbation_scale]``, as files and fingerprints have it.

        False follows where the part does not decay.
        """
        numbers: list[str | float] = [self.pattern, self.lr, self.perturbation_scale]
        return numbers if self.decays else [*numbers, False]

    def members(self, names: list[str]) -> list[str]:
        """Those of a view's names that belong to the group.

        Raises:
            NoMatchingParameterError: None does, or one that the group lists is not there.
        """
        if self.names:
            return names_listed(names, self.names)
        return names_matching(names, self.pattern)


Groups = Sequence[Group] | Literal["auto"]
"""What a view is given: its groups, or "auto" for those that suit it."""


def _listed(names: Iterable[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    listed = () if isinstance(names, str) else tuple(names)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ArgumentTypeError(f"names={names!r}; give a list of one or more names of tensors")
    return listed


def checked_groups(groups: Groups, usual: Sequence[Group]) -> Sequence[Group]:
    """The groups that were given, or the usual ones for "auto".

    Raises:
        ArgumentTypeError: Neither.
    """
    if isinstance(groups, str) and groups == "auto":
        return usual
    if isinstance(groups, str | Group) or not all(isinstance(group, Group) for group in groups):
        raise ArgumentTypeError(
            f"groups={groups!r}; give a list, as [Group('classifier', lr=10.0)], or 'auto'"
        )
    return groups


def assign_groups(
    names: list[str], groups: Sequence[Group]
) -> tuple[tuple[Group, ...], dict[str, int]]:
    """The groups, that of the rest last, and the group index of every tensor.

    Raises:
        NoMatchingParameterError: A group without a tensor.
    """
    if not groups:
        return (Group(""),), dict.fromkeys(names, 0)
    index: dict[str, int] = {}
    for position, group in enumerate(groups):
        for name in group.members(names):
            index.setdefault(name, position)
    rest = len(groups)
    return (*groups, Group("")), {name: index.get(name, rest) for name in names}
