"""What the objectives that run a model share: evaluation mode, batches, the call, the precision."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from objectives import _collate, _fit, _shared
from objectives.mixture import Mixable
from zo_adapt.errors import AdapterError, DataError, NotServableError, ObjectiveError, ZOError
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.objective import Objective
from zo_adapt.serve.asking import elsewhere

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
    made_with: Mapping[str, Any] = MappingProxyType({})
    """As in ``Objective``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._accepted = _fit.accepted_arguments(model)
        self._evaluation_mode = EvaluationMode(model)
        self._is_evaluating = False
        self.longest = _fit.positions(model)
        self._has_position_table = _fit.has_position_table(model)
        self._vocabulary = _vocabulary(model)
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
                left out. Or pairs (x, y): the model's first argument and the label.

        Raises:
            DataError: The examples do not make a batch.
        """
        examples = [self._named(example) for example in examples]
        return self._checked(_collate.collate(examples, self.pad_token_id, self._padded_length))

    def _padded_length(self, tokens: int) -> int:
        """On a GPU a few lengths instead of many: a CUDA graph is of one shape."""
        multiple = self.pad_to_multiple_of or (16 if self.device.type == "cuda" else 1)
        rounded = -(-tokens // multiple) * multiple
        return max(tokens, min(rounded, self.longest or rounded))

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        if self._device is not None:  # while layers are shifted, reading makes one
            return self._device
        return device_of(self.model)

    @property
    def pad_token_id(self) -> int | None:
        """What ``input_ids`` are padded with; any will do where the attention mask is read."""
        token: int | None = self.configured("pad_token_id", 0)
        return token

    def prepare(self, batch: Any) -> Batch:
        """What ``collate`` makes, from a list of examples, a mapping of tensors or their (x, y)."""
        batch = self._named(batch)
        if isinstance(batch, Mapping):
            return self._checked(_collate.tensors(batch))
        return self.collate(batch)

    def _named(self, batch: Any) -> Any:
        """An example or a batch (x, y) by the names that the model knows; others as they are."""
        found = _collate.pair(batch)
        return batch if found is None else _collate.named(*found, _fit.first_argument(self.model))

    def forward(self, batch: Batch) -> Tensor:
        """The model's logits, in its own dtype."""
        return _logits(self.outputs(batch))

    def outputs(self, batch: Batch, hidden: Collection[str] = ("labels",)) -> Any:
        """What the model returns.

        Args:
            batch: What it is called with, as far as it takes it.
            hidden: Fields that it is not shown: the loss is not its affair.

        Raises:
            DataError: No field of the batch is an argument of the model.
            NotServableError: The model is served, and this objective needs more than it answers.
        """
        if elsewhere() is not None:
            raise NotServableError(
                f"{type(self).__name__} runs the model itself, and a served one gives the "
                "log-probabilities of tokens and texts alone; on a server run CausalLMLoss, "
                "VerbalizerLoss, ExactMatch of these, or GenerationReward"
            )
        accepted = self._accepted
        inputs: dict[str, Any] = {
            name: value
            for name, value in batch.items()
            if name not in hidden and (accepted is None or name in accepted)
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
            return _shared.once(self.model, tensors, lambda: self._called(inputs))

    def _called(self, inputs: Mapping[str, Any]) -> Any:
        """What the model returns; where it cannot be called behind virtual tokens, by name."""
        try:
            return self.model(**inputs)
        except (ValueError, IndexError, AttributeError, NotImplementedError) as error:
            count = _fit.virtual_tokens(self.model)
            if not count or isinstance(error, ZOError):
                raise
            raise AdapterError(
                f"the model cannot be called behind {count} virtual tokens of peft's "
                f"({type(error).__name__}: {error}); where it can be called without the adapter, "
                "it does not fit this tuner: choose another (LoRA)"
            ) from error

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
        labels, ids = batch.get("labels"), batch.get("input_ids")
        # On the host this is free; on a GPU every look at a value would wait for the queue.
        if labels is not None and labels.device.type == "cpu":
            self.check_labels(labels)
        if ids is not None:
            self._check_tokens(ids, self.longest)
        device = self.device
        return {
            name: value.to(device, self._dtype_for(name, value)) for name, value in batch.items()
        }

    def _dtype_for(self, name: str, value: Tensor) -> torch.dtype:
        """The model's own for inputs in numpy's default, which no layer would take."""
        if value.dtype != torch.float64 or name == "labels":
            return value.dtype
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, value.dtype)

    def _check_tokens(self, ids: Tensor, longest: int | None) -> None:
        """Refuse texts that the model has no embeddings for."""
        if self._has_position_table and longest is not None and ids.shape[-1] > longest:
            raise DataError(
                f"a text has {ids.shape[-1]} tokens and the model reads {longest}; cut texts with "
                f"truncation=True, max_length={longest}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"the input_ids are of type {ids.dtype}; give integers")
        if self._vocabulary is None or ids.device.type != "cpu" or ids.numel() == 0:
            return
        smallest, largest = int(ids.min()), int(ids.max())
        if not 0 <= smallest <= largest < self._vocabulary:
            raise DataError(
                f"the input_ids lie in {smallest}..{largest}, the model's vocabulary is "
                f"0..{self._vocabulary - 1}: was the text tokenised for another model, or the "
                "embedding not resized after tokens were added?"
            )

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


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs belong: the CPU where its base is served, and here is none."""
    there = (p.device for p in model.parameters() if not p.is_meta)
    return next(there, torch.device("cpu"))


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model has embeddings for; None where it does not say."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = None if get is None else get()
    except (AttributeError, NotImplementedError):
        return None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None


def at_least_float32(tensor: Tensor) -> Tensor:
    """fp16 and bf16 to fp32: their resolution would quantise the difference of two losses."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_range(labels: Tensor, classes: int) -> None:
    """Refuse class labels outside 0 .. classes - 1.

    Raises:
        DataError: Gives the smallest and the largest label.
    """
    if labels.numel() == 0:
        return
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest == _collate.IGNORED:
        raise DataError(
            f"a label is {smallest}, which marks what no loss counts; leave such examples out "
            f"(the classes are 0..{classes - 1})"
        )
    if not 0 <= smallest <= largest < classes:
        more = f", or build the model with num_labels={largest + 1}" if largest >= classes else ""
        raise DataError(
            f"the labels lie in {smallest}..{largest}, the model has {classes} classes: choose "
            f"labels in 0..{classes - 1}{more}"
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
