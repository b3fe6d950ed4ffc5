"""How a view reads: in one line, and as a short table."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from zo_adapt.view.group import Group

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
