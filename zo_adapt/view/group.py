"""Groups: parts of a view with their own step, and how they and the view read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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


WIDEST_LABEL = 30


def in_one_line(tensors: Mapping[str, Tensor], groups: Sequence[Group], noise: str) -> str:
    """Sizes, dtypes, devices, groups and noise."""
    count = sum(tensor.numel() for tensor in tensors.values())
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    parts = f", {len(groups)} groups" if len(groups) > 1 else ""
    return (
        f"ParameterView({len(tensors)} tensors, {count:,} scalars, {'/'.join(kinds)} on "
        f"{'/'.join(devices)}{parts}, {noise})"
    )


def summary_of(
    tensors: Mapping[str, Tensor],
    groups: Sequence[Group],
    group_of: Mapping[str, int],
    *,
    noise: str,
    by_layer: bool,
    displacement: float,
) -> str:
    """One line for each group, and what holds for all of them."""
    lines = [f"{'tensors':>7} {'scalars':>15} {'bytes':>10} {'lr':>9} {'mu':>9}  group"]
    for index, group in enumerate(groups):
        members = [tensor for name, tensor in tensors.items() if group_of[name] == index]
        if members:
            is_rest = index == len(groups) - 1
            lines.append(_row(members, group, _label(group, is_rest, len(groups))))
    way = "layer by layer, in the scratch of the largest" if by_layer else "by way of a copy"
    more = [
        f"shifted {way}; noise {noise}",
        f"the search for a displacement begins at {displacement:.3g}",
    ]
    return "\n".join([in_one_line(tensors, groups, noise), *lines, *more])


def _row(members: Sequence[Tensor], group: Group, label: str) -> str:
    count = sum(tensor.numel() for tensor in members)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in members)
    factors = f"{f'x {group.lr:.3g}':>9} {f'x {group.perturbation_scale:.3g}':>9}"
    return f"{len(members):>7} {count:>15,} {size(nbytes):>10} {factors}  {label}"


def _label(group: Group, is_rest: bool, groups: int) -> str:
    if is_rest:
        return "the rest" if groups > 1 else "all"
    if not group.names:
        label = repr(group.pattern)
        return label if len(label) <= WIDEST_LABEL else f"{label[: WIDEST_LABEL - 3]}..."
    first, *others = group.names
    # The end of a parameter's name tells more than its beginning, which all have in common.
    label = first if len(first) <= WIDEST_LABEL else f"...{first[3 - WIDEST_LABEL :]}"
    return f"{label} and {len(others)} more" if others else label


def size(nbytes: float) -> str:
    """Bytes in the largest unit that leaves at least one of it.

    Example:
        >>> size(900), size(3 * 2**20)
        ('900 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
