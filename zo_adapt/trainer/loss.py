"""What ZOTrainer minimises by default: Trainer's own loss, in fp32."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

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
from zo_adapt.trainer.items import Count, ItemsOfLoss


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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in CAUSAL.values()


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
