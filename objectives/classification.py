"""Losses of models with a classification head."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._fit import check_one_row_a_text, takes_the_last_position
from objectives._model import Batch, ModelObjective, at_least_float32, check_range
from objectives._padding import of_whole_texts
from zo_adapt.errors import DataError


class ClassificationLoss(ModelObjective):
    """Loss of a sequence classifier, one value per example.

    With logits f(x) of shape (b, C), by ``config.problem_type`` or, where None, by the labels:
        integer labels y of shape (b,)    -log softmax(f(x))_y
        float labels y of shape (b, C)    mean_c BCE(f(x)_c, y_c)    (multi-label)
        C = 1, y of shape (b,)            (f(x) - y)^2               (regression; mean_c if C > 1)

    Args:
        model: A model with a head, such as ``AutoModelForSequenceClassification``; or any module
            that returns logits.

    Raises:
        DataError: (when called) Labels missing, out of range or of a wrong shape; examples that do
            not make a batch.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_labels=3,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> loss = ClassificationLoss(BertForSequenceClassification(config))
        >>> examples = [{"input_ids": [2, 7], "label": 0}, {"input_ids": [5], "label": 2}]
        >>> batch = loss.collate(examples)
        >>> loss(batch).shape, loss.logits(batch).argmax(-1).shape
        (torch.Size([2]), torch.Size([2]))
    """

    capturable = True

    def __init__(self, model: nn.Module) -> None:
        check_one_row_a_text(model, type(self).__name__)
        super().__init__(model)
        self._classes: int | None = None
        if takes_the_last_position(model):
            self.capturable = False  # the lengths decide how often it runs

    def __call__(self, batch: object) -> Tensor:
        """Losses of shape (b,), fp32, of a collated batch or a list of examples."""
        prepared = self.prepare(batch)
        labels = self.labels(prepared)
        return self._losses(self._checked_logits(self.forward(prepared), labels), labels)

    def logits(self, batch: object) -> Tensor:
        """Logits of shape (b, C), fp32; labels are not needed."""
        return self._checked_logits(self.forward(self.prepare(batch)))

    def forward(self, batch: Batch) -> Tensor:
        """The model's logits, in its own dtype."""
        return of_whole_texts(self.model, batch, super().forward)

    @property
    def pad_token_id(self) -> int | None:
        """None where there is none: decoders look for this token to find the end of the text."""
        token: int | None = self.configured("pad_token_id")
        return token if hasattr(self.model, "config") else 0

    def check_labels(self, labels: Tensor) -> None:
        """Refuse class labels that the head has no output for."""
        classes = self.configured("num_labels", self._classes)
        if classes is None or labels.is_floating_point() or labels.dim() > 1:
            return  # of several labels an example the shape is checked beside the logits
        if self.problem(classes, labels) == "single_label_classification":
            check_range(labels, classes)

    def _checked_logits(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """In at least fp32, after a check that there is one row of them for every example.

        Raises:
            DataError: The model says something of every token, or of nothing.
        """
        if logits.dim() != 2:
            raise DataError(
                f"the model gives logits of shape {tuple(logits.shape)}, and this objective is of "
                "models with one row of logits for an example, (b, C); for a label of every token "
                "choose TokenClassificationLoss, for the next token CausalLMLoss"
            )
        # Without a configuration it is the first answer that tells.
        if self._classes is None and self.configured("num_labels") is None:
            self._classes = logits.shape[-1]
            if labels is not None:
                self.check_labels(labels)
        return at_least_float32(logits)

    def outputs(self, batch: Batch, hidden: Collection[str] = ("labels",)) -> Any:
        """What the model returns.

        Raises:
            DataError: A decoder is to find the end of several texts and knows no padding token.
        """
        try:
            return super().outputs(batch, hidden)
        except ValueError as error:
            if "no padding token" not in str(error):
                raise
            raise DataError(
                f"{type(self.model).__name__} looks for the padding token to find the end of a "
                "text, and has none; set model.config.pad_token_id (tokenizer.pad_token_id)"
            ) from error

    def problem(self, classes: int, labels: Tensor) -> str:
        """As transformers decides it, except that nothing is written into the configuration."""
        if classes == 1:
            by_labels = "regression"
        elif labels.is_floating_point():
            by_labels = "multi_label_classification"
        else:
            by_labels = "single_label_classification"
        problem: str = self.configured("problem_type", by_labels)
        return problem

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.problem(logits.shape[-1], labels)
        if problem == "single_label_classification":
            _check_shape(
                labels, logits.shape[:-1] if not labels.is_floating_point() else logits.shape
            )
            labels = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
            losses = F.cross_entropy(logits, labels, reduction="none")
            # A row that is marked to be left out has no loss; torch gives it 0, the best there is.
            ignored = labels == IGNORED if labels.dim() == 1 else labels.isnan().any(-1)
            return losses.masked_fill(ignored, torch.nan)
        if labels.shape == logits.shape[:-1] and logits.shape[-1] == 1:
            labels = labels[..., None]
        _check_shape(labels, logits.shape)
        targets = labels.to(logits.dtype)
        if problem == "regression":
            return (logits - targets).square().mean(-1)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def _check_shape(labels: Tensor, expected: tuple[int, ...]) -> None:
    if labels.shape != expected:
        raise DataError(
            f"the labels have shape {tuple(labels.shape)} ({labels.dtype}); this model and problem "
            f"take {tuple(expected)}. config.problem_type says which problem it is"
        )
