"""What ZOTrainer minimises by default: Trainer's own loss, in fp32."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.objective import SetObjective


class TrainerLoss(SetObjective):
    """Trainer's own ``compute_loss`` as an objective: the mean over the items it is shown.

    An item is what the model's loss is a mean over: a label that counts (a token, where labels are
    a row of them), or an example. The loss of micro-batches is that of their batch as a whole.
    """

    min_rows = 1
    independent_rows = False  # one number cannot be cut into the parts of several candidates

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer, self._model = trainer, model
        self.evaluating = EvaluationMode(model)
        self._shifted = shifts_labels(model)
        halves = (torch.float16, torch.bfloat16)
        self._in_half = any(p.dtype in halves for p in model.parameters())

    def predict(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | int]:
        """The loss of a collated batch, a scalar, and its number of items."""
        precision = Float32Losses() if self._in_half else nullcontext()
        with self._trainer.compute_loss_context_manager(), precision:
            loss: Tensor = self._trainer.compute_loss(self._model, dict(inputs))
        return loss, items_of(inputs, shifted=self._shifted)

    def score(self, predictions: list[tuple[Tensor, Tensor | int]]) -> Tensor:
        """The mean over the items of all parts."""
        if len(predictions) == 1:
            return predictions[0][0]
        # A part without any label that counts is 0 / 0 in most losses.
        parts = [(loss.double(), items) for loss, items in predictions if items > 0]
        if not parts:
            return predictions[0][0]
        total = sum(items for _, items in parts)
        return torch.stack([loss * items for loss, items in parts]).sum() / total


def shifts_labels(model: Any) -> bool:
    """Whether a model's loss pairs each label with the position before, as decoders' do."""
    model = getattr(model, "module", model)  # of a wrapper for several processes
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(model, "config", None)
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return is_causal and not getattr(config, "is_encoder_decoder", False)


def items_of(inputs: Mapping[str, Any], *, shifted: bool) -> Tensor | int:
    """How many items the loss of a batch is a mean over.

    Args:
        inputs: The collated batch.
        shifted: Whether the model's loss pairs each label with the position before, so that the
            first of a row does not count.

    Example:
        >>> labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
        >>> int(items_of({"labels": labels}, shifted=True))
        1
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor) or not labels.ndim:
        return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), 1)
    if labels.is_floating_point():
        return len(labels)
    if shifted and "shift_labels" not in inputs and labels.ndim > 1:
        labels = labels[..., 1:]
    return labels.ne(IGNORED).sum()


IGNORED = -100
"""The label that losses leave out."""


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
