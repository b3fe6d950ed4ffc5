"""What the metrics of a classifier share: logits and labels collected in parts, scored once."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._model import Batch, at_least_float32
from objectives.classification import ClassificationLoss
from objectives.mixture import Mixable
from zo_adapt.errors import DataError, NonFiniteObjectiveError, UndefinedMetricError
from zo_adapt.evaluation.objective import SetObjective, checked_min_rows


class Classifier(Protocol):
    """What gives logits: ``ClassificationLoss``, ``VerbalizerLoss``."""

    model: nn.Module

    def collate(self, examples: Sequence[Any], /) -> Batch:
        """A batch of a list of examples."""

    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which the model is in evaluation mode."""

    def prepare(self, batch: Any, /) -> Batch:
        """The same batch, ready for the model."""

    def logits(self, batch: Any, /) -> Tensor:
        """Logits of shape (b, C)."""

    def labels(self, batch: Batch, /) -> Tensor:
        """Labels of shape (b,), or (b, C) for several labels at once."""


class AnyLabels(ClassificationLoss):
    """Batches and logits for labels of any kind."""

    def check_labels(self, labels: Tensor) -> None:
        """What the labels mean is the metric's own affair."""

    def logits(self, batch: object) -> Tensor:
        """Of any shape, fp32."""
        return at_least_float32(self.forward(self.prepare(batch)))


class Predictions(NamedTuple):
    """What a micro-batch leaves behind."""

    logits: np.ndarray
    labels: np.ndarray


class SetMetric(Mixable, SetObjective):
    """Base of the metrics: more is better, and the value is that of the whole batch.

    Args:
        model: A model with a classification head, or an objective that gives logits
            (``VerbalizerLoss`` for a prompted one).
        min_rows: Fewest rows that the metric may be computed on where a batch is split over several
            directions; "all" keeps a batch whole.
    """

    maximize: bool = True
    step_like: bool = True

    def __init__(
        self, model: nn.Module | Classifier, *, min_rows: int | Literal["all"] = "all"
    ) -> None:
        self.classifier: Classifier = (
            ClassificationLoss(model) if isinstance(model, nn.Module) else model
        )
        self.made_with = {"model": self.classifier}
        self.min_rows = checked_min_rows(min_rows)
        self.check_labels = getattr(self.classifier, "check_labels", None)

    @property
    def model(self) -> nn.Module:
        """The model behind the logits."""
        return self.classifier.model

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch of a list of examples, as the loss of the same model makes it."""
        return self.classifier.collate(examples)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode of the model."""
        return self.classifier.evaluating()

    def __call__(self, batch: Any) -> Any:
        """The metric on one batch, or a list of examples."""
        return self.score([self.predict(batch)])

    def predict(self, batch: Any) -> Any:
        """Logits and labels of one micro-batch.

        Raises:
            DataError: There are no labels.
        """
        prepared = self.classifier.prepare(batch)
        labels = self.classifier.labels(prepared)
        logits = self.classifier.logits(prepared)
        return Predictions(array(logits), array(_class_numbers(self.classifier, logits, labels)))

    def score(self, predictions: list[Any]) -> Any:
        """The metric of all micro-batches together.

        Raises:
            UndefinedMetricError: It has no value on these rows.
        """
        logits, labels = joined(predictions)
        value = float(self.metric(logits, labels))
        if np.isnan(value):
            raise UndefinedMetricError(
                f"{type(self).__name__} is not defined on these {len(labels)} rows, whose labels "
                f"are {np.unique(labels).tolist()[:8]}; raise batch_size or min_rows"
            )
        return value

    @abstractmethod
    def metric(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The value from logits (n, C) and labels (n,) or (n, C)."""


def _class_numbers(classifier: Classifier, logits: Tensor, labels: Tensor) -> Tensor:
    """Labels in floats as class numbers, where the configuration says one class an example.

    Raises:
        DataError: They are not one-hot.
    """
    as_floats = labels.is_floating_point() and labels.dim() == 2 and labels.shape == logits.shape
    if not (as_floats and isinstance(classifier, ClassificationLoss)):
        return labels
    if classifier.problem(labels.shape[1], labels) != "single_label_classification":
        return labels
    if not bool(((labels == 1).sum(1) == 1).all() and ((labels == 0) | (labels == 1)).all()):
        raise DataError(
            "the labels are shares of classes, and config.problem_type is "
            "'single_label_classification': a metric needs one class an example; give integers"
        )
    return labels.argmax(1)


def joined(predictions: Sequence[Predictions]) -> Predictions:
    """Logits and labels of all micro-batches, after a check of both.

    Raises:
        NonFiniteObjectiveError: NaN or infinity among the logits.
        DataError: Labels of a wrong shape.
    """
    logits = np.concatenate([part.logits for part in predictions])
    labels = np.concatenate([part.labels for part in predictions])
    check_finite(logits)
    check_shape(logits, labels)
    return Predictions(logits, labels)


def predicted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The classes that the logits say: (n,), or (n, C) of 0 and 1 for several labels at once.

    Raises:
        DataError: Labels of something else.
    """
    check_labels(labels, logits.shape)
    if labels.shape == logits.shape:
        return (logits > 0).astype(int)
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).astype(int)
    classes: np.ndarray = logits.argmax(1)
    return classes


def check_labels(labels: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse labels that name no class.

    Args:
        labels: (n,), or (n, C) for several labels at once.
        shape: Of the logits, (n, C).
    """
    yes_or_no = labels.shape == shape or shape[-1] == 1
    is_class = np.isin(labels, (0, 1) if yes_or_no else range(shape[-1]))
    if not is_class.all():
        kind = "0 and 1" if yes_or_no else f"classes 0..{shape[-1] - 1}"
        kind += ", for one logit says yes or no" if shape[-1] == 1 else ""
        kind += " (-100 marks what no loss counts: leave such examples out)" * bool(
            (labels == IGNORED).any()
        )
        raise DataError(
            f"labels {np.unique(labels[~is_class]).tolist()[:8]} for logits of shape {shape}: "
            f"these must be {kind}; relabel them, or give the model a logit for each class"
        )


def check_finite(logits: np.ndarray) -> None:
    """Refuse logits that are not numbers: their order would mean nothing."""
    if not np.isfinite(logits).all():
        raise NonFiniteObjectiveError(
            f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} outputs of the model are "
            "NaN or infinite; a smaller lr or perturbation_scale keeps them finite"
        )


def check_shape(logits: np.ndarray, labels: np.ndarray) -> None:
    """Refuse labels that are neither one per example nor one per example and class."""
    if logits.ndim != 2 or labels.shape not in (logits.shape[:1], logits.shape):
        raise DataError(
            f"labels of shape {labels.shape} for logits of shape {logits.shape}; give one label"
            " per example, or one per example and class"
        )


def array(tensor: Tensor) -> np.ndarray:
    """On the host, half precision widened: numpy has no bfloat16."""
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    values: np.ndarray = tensor.detach().cpu().numpy()
    return values
