"""What ZOTrainer minimises by default: Trainer's own loss, in fp32."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zo_adapt.evaluation.mode import EvaluationMode
from zo_adapt.evaluation.objective import Objective


class TrainerLoss(Objective):
    """Trainer's own ``compute_loss`` as an objective: the mean over the rows it is shown."""

    mean_over_rows = True
    independent_rows = False  # one number cannot be cut into the parts of several candidates

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer, self._model = trainer, model
        self.evaluating = EvaluationMode(model)
        halves = (torch.float16, torch.bfloat16)
        self._in_half = any(p.dtype in halves for p in model.parameters())

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a collated batch, a scalar."""
        precision = Float32Losses() if self._in_half else nullcontext()
        with self._trainer.compute_loss_context_manager(), precision:
            loss: Tensor = self._trainer.compute_loss(self._model, dict(inputs))
        return loss


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
