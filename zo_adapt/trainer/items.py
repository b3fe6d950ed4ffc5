"""How many items a loss is a mean over, by which the losses of parts of a batch are weighted."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

IGNORED = -100
"""The label that losses leave out."""
Rule = Literal["labels", "shifted", "rows"]
Count = Tensor | int


class Mean(NamedTuple):
    """One mean that a loss took.

    Args:
        items: How many items it is over; of a weighted mean, their weights added up.
        target: Of these items.
        is_plain: Whether every label but -100 counts the same.
        is_of_classes: Whether it compares a class with logits; else numbers with numbers.
    """

    items: Count
    target: Tensor
    is_plain: bool
    is_of_classes: bool


class ItemsOfLoss:
    """Counts the items of a batch as the model's own loss does, which is watched once.

    Some models leave the first label of a row out and others do not, whatever they are called. A
    loss that is no single mean over labels or rows is watched at every call.

    Args:
        shifted: Whether labels are shifted where no loss of torch's is called (label smoothing).
    """

    def __init__(self, shifted: bool) -> None:
        self._rule: Rule | None = None
        self._shifted = shifted

    def counted(
        self, inputs: Mapping[str, Any], compute: Callable[[], Tensor]
    ) -> tuple[Tensor, list[Count]]:
        """The loss of a batch and the items of each mean in it."""
        if self._rule is not None:
            return compute(), [items_of(inputs, self._rule)]
        with Watching() as watching:
            loss = compute()
        means = watching.means
        if not means:
            self._rule = "shifted" if self._shifted else "labels"
            return loss, [items_of(inputs, self._rule)]
        if len(means) == 1:
            self._rule = _rule_of(means[0], inputs)
        return loss, [mean.items for mean in means]


def _rule_of(mean: Mean, inputs: Mapping[str, Any]) -> Rule | None:
    """What items are in every batch, if that is what this mean has."""
    labels = inputs.get("labels")
    if not mean.is_plain or not isinstance(labels, Tensor):
        return None
    if not mean.is_of_classes:
        return "rows" if len(mean.target) == len(labels) else None
    flat = mean.target.flatten()
    if bool((flat == IGNORED).all()):
        return None  # the next batch will tell
    shifted = F.pad(labels[..., 1:], (0, 1), value=IGNORED) if labels.dim() > 1 else labels
    forms: dict[Rule, list[Tensor]] = {"labels": [labels], "shifted": [shifted, labels[..., 1:]]}
    return next((rule for rule in forms if any(_are_equal(flat, f) for f in forms[rule])), None)


def _are_equal(flat: Tensor, other: Tensor) -> bool:
    return flat.numel() == other.numel() and bool((flat == other.flatten().to(flat.device)).all())


def items_of(inputs: Mapping[str, Any], rule: Rule) -> Count:
    """How many items a batch has.

    Args:
        inputs: The collated batch.
        rule: "labels", those that are not -100; "shifted", the first of a row left out, as each is
            paired with the position before; "rows".

    Example:
        >>> import torch
        >>> labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
        >>> [int(items_of({"labels": labels}, rule)) for rule in ("labels", "shifted", "rows")]
        [3, 1, 2]
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor) or not labels.ndim:
        return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), 1)
    if rule == "rows" or labels.is_floating_point():
        return len(labels)
    if rule == "shifted" and "shift_labels" not in inputs and labels.ndim > 1:
        labels = labels[..., 1:]
    return labels.ne(IGNORED).sum()


class Watching(TorchFunctionMode):
    """Inside, the means that losses take are noted."""

    of_classes = (F.cross_entropy, F.nll_loss)
    of_numbers = (F.mse_loss, F.binary_cross_entropy_with_logits, F.l1_loss, F.smooth_l1_loss)

    def __init__(self) -> None:
        super().__init__()
        self.means: list[Mean] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.of_classes or func in self.of_numbers:
            said = inspect.signature(func).bind(*args, **kwargs)
            said.apply_defaults()
            if said.arguments["reduction"] != "none":  # of which the caller makes what it likes
                self.means.append(_mean(said.arguments, func in self.of_classes))
        return func(*args, **kwargs)


def _mean(said: Mapping[str, Any], is_of_classes: bool) -> Mean:
    target, weight = said["target"], said.get("weight")
    if not is_of_classes or target.is_floating_point():
        return Mean(len(target) if target.ndim else 1, target, weight is None, False)
    counted = target != said["ignore_index"]
    is_plain = weight is None and said["ignore_index"] == IGNORED
    items = counted.sum() if weight is None else weight[target[counted]].sum()
    return Mean(items, target, is_plain, True)
