"""Loss and entity F1 of models that label every token."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._model import Batch
from objectives._set_metric import array, check_finite
from objectives._token_loss import LabelTokens, TokenLoss, check_labelled
from objectives.mixture import Mixable
from zo_adapt.errors import DataError, OptionError, UndefinedMetricError
from zo_adapt.evaluation.objective import SetObjective, checked_min_rows

Entity = tuple[str, int, int]
"""Type, first tag, one past the last."""


class TokenClassificationLoss(TokenLoss):
    """Cross-entropy of the labels of the tokens, one value per example.

    l_t = -log softmax(f(x)_t)_{y_t}, added up over the labelled tokens of an example as
    ``CausalLMLoss`` does by ``reduction``.

    Examples have ``input_ids`` and ``labels``, one for every token, -100 where none counts (special
    tokens, the later pieces of a word).

    Args:
        model: ``AutoModelForTokenClassification``, or any module with logits (b, t, C).
        reduction: "example", "token" or "sum"; "token" is the mean that the model itself returns.

    Raises:
        OptionError: Another reduction.
        DataError: (when called) Labels missing, out of range or not one for every token; an example
            without a label.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_labels=3,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> loss = TokenClassificationLoss(BertForTokenClassification(config))
        >>> loss([{"input_ids": [2, 7, 8], "labels": [-100, 0, 2]}]).shape
        torch.Size([1])
    """

    @property
    def classes(self) -> int | None:
        """How many labels there are to choose from."""
        found: int | None = self.configured("num_labels")
        return found

    def label_tokens(self, batch: object) -> LabelTokens:
        """The labels of the tokens that have one, and their logits."""
        prepared = self.prepare(batch)
        labels = self.labels(prepared)
        shape = tuple(prepared["input_ids"].shape) if "input_ids" in prepared else labels.shape
        logits = self.forward(prepared)
        if labels.shape != shape or logits.dim() != 3:
            raise DataError(
                f"labels of shape {tuple(labels.shape)} and logits of shape {tuple(logits.shape)} "
                f"for tokens of shape {shape}; give one label for every token, and a model with "
                "one row of logits for each (AutoModelForTokenClassification)"
            )
        check_labelled(labels)
        places = labels != IGNORED
        # From the end: peft's prompt tuning puts virtual tokens before the text.
        return LabelTokens(logits[:, -labels.shape[1] :][places], labels[places], places)


class EntityF1(Mixable, SetObjective):
    """The harmonic mean of precision and recall of entities: spans of tokens with their types.

    F1 = 2 TP / (2 TP + FP + FN), over the entities of all examples; one is right if its type, its
    first and its last token are. Tags are read as ``conlleval`` and seqeval's default read them: an
    entity begins at B-, and at I- after anything but its own type. (IOBES and names without a
    prefix are read, too.)

    Args:
        model: A token classifier, or ``TokenClassificationLoss``.
        labels: The tag of each class ("O", "B-PER", ...); None: ``config.id2label``.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Raises:
        OptionError: The tags are not known.
        UndefinedMetricError: (when called) There is no entity, neither labelled nor predicted.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_labels=3,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> f1 = EntityF1(BertForTokenClassification(config), labels=["O", "B-PER", "I-PER"])
        >>> 0.0 <= f1([{"input_ids": [2, 7, 8], "labels": [0, 1, 2]}]) <= 1.0
        True

    Reference: Tjong Kim Sang and De Meulder (2003), CoNLL-2003 shared task.
    """

    maximize = True
    step_like = True

    def __init__(
        self,
        model: nn.Module | TokenClassificationLoss,
        *,
        labels: Sequence[str] | None = None,
        min_rows: int | Literal["all"] = "all",
    ) -> None:
        self.classifier = (
            model if isinstance(model, TokenClassificationLoss) else TokenClassificationLoss(model)
        )
        self.min_rows = checked_min_rows(min_rows)
        self.made_with = {"model": self.classifier, "labels": labels}
        self.tags = _tags(labels, self.classifier.configured("id2label"))

    @property
    def model(self) -> nn.Module:
        """The model behind the logits."""
        return self.classifier.model

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch of a list of examples, as the loss of the same model makes it."""
        return self.classifier.collate(examples)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that the model has no logit for."""
        self.classifier.check_labels(labels)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode of the model."""
        return self.classifier.evaluating()

    def predict(self, batch: Any) -> np.ndarray:
        """Of every example the entities that are right, predicted and labelled, (b, 3)."""
        tokens = self.classifier.label_tokens(batch)
        check_finite(array(tokens.logits.amax(-1)))
        said, meant = tokens.logits.argmax(-1), tokens.ids
        sizes = tokens.places.sum(1).tolist()
        return np.array(
            [
                _counts(self._entities(one), self._entities(other))
                for one, other in zip(said.split(sizes), meant.split(sizes), strict=True)
            ]
        )

    def score(self, predictions: list[np.ndarray]) -> float:
        """F1 over the entities of all examples.

        Raises:
            UndefinedMetricError: There are none.
        """
        right, predicted, labelled = np.concatenate(predictions).sum(0)
        if predicted + labelled == 0:
            rows = sum(map(len, predictions))
            raise UndefinedMetricError(
                f"EntityF1 is not defined on these {rows} rows, which have no entity, neither "
                "labelled nor predicted; raise batch_size or min_rows"
            )
        return float(2 * right / (predicted + labelled))

    def _entities(self, ids: Tensor) -> set[Entity]:
        return entities([self.tags[index] for index in ids.tolist()])


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that a sequence of tags means.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[Entity] = set()
    begun, before, kind_before = 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-") if "-" in tag else ("I", "", tag)
        prefix = "O" if tag == "O" else prefix
        is_new = prefix in "OBSU" or kind != kind_before or before in "ESLU"
        if before != "O" and is_new:
            found.add((kind_before, begun, index))
        if is_new or before == "O":
            begun = index
        before, kind_before = prefix, kind
    return found


def _counts(said: set[Entity], meant: set[Entity]) -> tuple[int, int, int]:
    return len(said & meant), len(said), len(meant)


def _tags(given: Sequence[str] | None, configured: Mapping[int, str] | None) -> list[str]:
    """The tag of each class.

    Raises:
        OptionError: There are none, or none of them is "O".
    """
    tags = [configured[i] for i in sorted(configured)] if configured and given is None else given
    if tags is None or isinstance(tags, str) or "O" not in tags:
        raise OptionError(
            f"the tags of the classes are {list(tags or ())!r:.80}, without 'O' for no entity; "
            "give labels=['O', 'B-PER', 'I-PER', ...], or set model.config.id2label"
        )
    return list(tags)
