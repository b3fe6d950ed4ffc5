"""Weight decay as Trainer has it: LayerNorms and biases are left out."""

from collections.abc import Iterable

from zo_adapt.view.group import Group
from zo_adapt.view.parameters import ParameterView


def without_decay(view: ParameterView, names: Iterable[str]) -> ParameterView:
    """The same view, of which some tensors do not decay.

    Args:
        view: The view.
        names: Of tensors; those that it does not hold are passed over.

    Example:
        >>> import torch
        >>> view = ParameterView({"weight": torch.ones(2), "bias": torch.ones(2)})
        >>> without_decay(view, ["bias"]).groups
        (Group(names=['bias'], lr=1.0, perturbation_scale=1.0, decays=False), \
Group('', lr=1.0, perturbation_scale=1.0))
    """
    exempt = {name for name in names if name in view.tensors and view.group_of(name).decays}
    parts = [
        (group, [name for name in view.tensors if name in exempt and view.group_of(name) is group])
        for group in view.groups
    ]
    new = [
        Group(
            names=members,
            lr=group.lr,
            perturbation_scale=group.perturbation_scale,
            decays=False,
        )
        for group, members in parts
        if members and group.lr * group.perturbation_scale > 0  # what rests does not decay
    ]
    if not new:
        return view
    changed = ParameterView(
        view.tensors,
        model=view.model,
        noise=view.noise.name,
        groups=[*new, *view.groups[:-1]],
        scratch="layer" if view.by_layer else "copy",
    )
    changed.displacement = view.displacement
    return changed
