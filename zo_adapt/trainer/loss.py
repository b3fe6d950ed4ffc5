"""What ZOTrainer minimises by default: Trainer's own loss, in fp32.

Parts of a batch are weighted by how many items their losses are means over.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from zo_adapt.data.sources import Source
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.objective import SetObjective
from zo_adapt.evaluation.start_checks import is_made_of_its_parts

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


class TrainerLoss(SetObjective):
    """Trainer's own ``compute_loss`` as an objective: the mean over the items it is shown.

    An item is what the model's loss is a mean over: a label that counts (a token, where labels are
    a row of them), or an example. The loss of micro-batches is that of their batch as a whole.
    One that is no such mean (in-batch negatives) is computed of whole batches only.
    """

    min_rows = 1
    independent_rows = False  # one number cannot be cut into the parts of several candidates

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer, self._model = trainer, model
        self.evaluating = EvaluationMode(model)
        halves = (torch.float16, torch.bfloat16)
        self._in_half = any(p.dtype in halves for p in model.parameters())
        self._items = ItemsOfLoss(_shifts(trainer))

    def keep_whole_if_needed(self, source: Source) -> None:
        """Find whether the loss compares the rows of a batch, so that none may be cut."""
        if not self._is_usual and not is_made_of_its_parts(self, source, self._model):
            self.mean_over_rows = False

    @property
    def _is_usual(self) -> bool:
        """Whether it is a loss of transformers' own, which are means."""
        trainer, model = self._trainer, _base(self._model)
        own = type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func
        return not own and getattr(model, "loss_type", None) in LOSS_MAPPING

    def predict(self, inputs: Mapping[str, Any]) -> tuple[Tensor, list[Count]]:
        """The loss of a collated batch, a scalar, and the number of items of each mean in it."""
        precision = Float32Losses() if self._in_half else nullcontext()
        with self._trainer.compute_loss_context_manager(), precision:
            return self._items.counted(
                inputs, lambda: self._trainer.compute_loss(self._model, dict(inputs))
            )

    def score(self, predictions: list[tuple[Tensor, list[Count]]]) -> Tensor:
        """The mean over the items of all parts.

        Raises:
            OptionError: The loss adds up means over different items.
        """
        if len(predictions) == 1:
            return predictions[0][0]
        parts = [(loss.double(), _one_count(items)) for loss, items in predictions]
        # A part without any label that counts is 0 / 0 in most losses.
        parts = [(loss, items) for loss, items in parts if items > 0]
        if not parts:
            return predictions[0][0]
        total = sum(items for _, items in parts)
        return torch.stack([loss * items for loss, items in parts]).sum() / total


def shifts_labels(model: Any) -> bool:
    """Whether a model's loss pairs each label with the position before, as decoders' do."""
    model = _base(model)
    config = getattr(model, "config", None)
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return is_causal and not getattr(config, "is_encoder_decoder", False)


def _base(model: Any) -> Any:
    """The model itself, without peft and the wrapper for several processes."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _one_count(items: list[Count]) -> Count:
    numbers = sorted({float(count) for count in items})
    if len(numbers) > 1:
        raise OptionError(
            f"the model's loss adds up means over {numbers[0]:g} and {numbers[-1]:g} items of a "
            "batch, which its parts do not tell; leave out micro_batch_size, or choose it as large "
            "as the largest batch of a step"
        )
    return items[0]


def _shifts(trainer: Any) -> bool:
    """Whether labels are paired with the positions before, by Trainer's rules for what it knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.label_smoother is None:
        return shifts_labels(model)
    return type(_base(model)).__name__ in CAUSAL.values()


class Float32Losses(TorchFunctionMode):
    """Inside, losses are computed in fp32 wherever a model computes them.

    A model in half precision rounds its loss to 8 or 11 bits, which is coarser than the difference
    of two losses that a step looks at.
    """

    losses = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits, F.log_softmax)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.losses:
            args = tuple(_upcast(value) for value in args)
            kwargs = {name: _upcast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _upcast(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
