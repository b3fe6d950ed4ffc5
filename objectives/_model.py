"""What the objectives that run a model share: evaluation mode, batches, the call, the precision."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from objectives import _collate, _shared
from objectives.mixture import Mixable
from zo_adapt.errors import DataError, ObjectiveError
from zo_adapt.evaluation.mode import EvaluationMode
from zo_adapt.evaluation.objective import Objective

Batch = dict[str, Tensor]


class ModelRunner:
    """Makes batches of examples and runs a model on them, in evaluation mode and without labels.

    Args:
        model: A transformers model, a peft one, or any module with ``forward(**batch)``.

    Attributes:
        pad_to_multiple_of: Batches of texts are padded to a multiple of so many tokens; None: of 16
            on a GPU, to the longest text elsewhere.
    """

    pad_to_multiple_of: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._accepted = accepted_arguments(model)
        self._evaluation_mode = EvaluationMode(model)
        self._is_evaluating = False
        self._device: torch.device | None = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, every module is in evaluation mode; afterwards each has its own mode back."""
        if self._is_evaluating:  # walking over all modules once per step is enough
            yield
            return
        self._is_evaluating, self._device = True, self.device
        try:
            with self._evaluation_mode():
                yield
        finally:
            self._is_evaluating, self._device = False, None

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch on the model's device from a list of examples of any length.

        Args:
            examples: Mappings with ``input_ids`` and what else the model takes; fields of text are
                left out.

        Raises:
            DataError: The examples do not make a batch.
        """
        return self._checked(_collate.collate(examples, self.pad_token_id, self._padded_length))

    def _padded_length(self, tokens: int) -> int:
        """On a GPU a few lengths instead of many: a CUDA graph is of one shape."""
        multiple = self.pad_to_multiple_of or (16 if self.device.type == "cuda" else 1)
        longest: int = self.configured("max_position_embeddings", tokens)
        return max(tokens, min(-(-tokens // multiple) * multiple, longest))

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        if self._device is not None:  # while layers are shifted, reading makes one
            return self._device
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def pad_token_id(self) -> int | None:
        """What ``input_ids`` are padded with; any will do where the attention mask is read."""
        token: int | None = self.configured("pad_token_id", 0)
        return token

    def prepare(self, batch: Any) -> Batch:
        """What ``collate`` makes, from a list of examples or from a mapping of tensors."""
        if isinstance(batch, Mapping):
            return self._checked(_collate.tensors(batch))
        return self.collate(batch)

    def forward(self, batch: Batch) -> Tensor:
        """The model's logits, in its own dtype."""
        return _logits(self.outputs(batch))

    def outputs(self, batch: Batch) -> Any:
        """What the model returns; it is not shown the labels.

        Raises:
            DataError: No field of the batch is an argument of the model.
        """
        accepted = self._accepted
        inputs: dict[str, Any] = {
            name: value
            for name, value in batch.items()
            if name != "labels" and (accepted is None or name in accepted)
        }
        if not inputs:
            raise DataError(
                f"none of the fields {sorted(batch)} is an argument of the model; it takes "
                f"{sorted(accepted or ())}. Tokenise the text first"
            )
        if accepted is not None and "use_cache" in accepted:
            inputs["use_cache"] = False  # keys and values that nothing would read
        tensors = [value for _, value in sorted(inputs.items()) if isinstance(value, Tensor)]
        with self.evaluating():
            return _shared.once(self.model, tensors, lambda: self.model(**inputs))

    def labels(self, batch: Batch) -> Tensor:
        """The labels of a prepared batch.

        Raises:
            DataError: There are none.
        """
        if "labels" not in batch:
            raise DataError(
                f"the batch has no labels, only {sorted(batch)}; name the field 'labels'"
            )
        return batch["labels"]

    def configured(self, name: str, default: Any = None) -> Any:
        """An entry of the model's configuration, ``default`` where it has none or it is None."""
        value = getattr(getattr(self.model, "config", None), name, None)
        return default if value is None else value

    def _checked(self, batch: Batch) -> Batch:
        labels = batch.get("labels")
        # On the host this is free; on a GPU every look at a value would wait for the queue.
        if labels is not None and labels.device.type == "cpu":
            self.check_labels(labels)
        device = self.device
        return {name: value.to(device) for name, value in batch.items()}

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels outside their range; for subclasses."""


class ModelObjective(Mixable, ModelRunner, Objective):  # type: ignore[misc]
    """Base of the losses of a model.

    The loss is computed here, per example and in at least fp32, whatever the model's dtype. Nothing
    is wrapped in ``no_grad``: the same objective serves the first-order baselines.

    Args:
        model: A transformers model, a peft one, or any module with ``forward(**batch)``.
    """

    mean_over_rows = True


def accepted_arguments(model: nn.Module) -> frozenset[str] | None:
    """Names of the arguments of the model's forward, peft seen through; None when it takes any."""
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    parameters = inspect.signature(type(base).forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return frozenset(named - {"self"}) or None


def at_least_float32(tensor: Tensor) -> Tensor:
    """fp16 and bf16 to fp32: their resolution would quantise the difference of two losses."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_range(labels: Tensor, classes: int) -> None:
    """Refuse class labels outside 0 .. classes - 1.

    Raises:
        DataError: Gives the smallest and the largest label.
    """
    smallest, largest = int(labels.min()), int(labels.max())
    if not 0 <= smallest <= largest < classes:
        raise DataError(
            f"the labels lie in {smallest}..{largest}, the model has {classes} classes: choose "
            f"labels in 0..{classes - 1}, or build the model with num_labels={largest + 1}"
        )


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, tuple | list):
        outputs = outputs[0]
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ObjectiveError(
            f"the model returned {type(outputs).__name__} without logits; load it with a head "
            "(AutoModelFor...)"
        )
    return logits
