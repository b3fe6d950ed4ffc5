"""Metrics of a classifier as objectives. scikit-learn computes them.

    minimize(F1(model), view, train, MeZO(), batch_size=128, max_queries=50_000)

climbs. A metric counts: on a few rows it hardly moves when the weights do. The optimizers perturb
ten times as far as for a loss (``step_like``) and ask about many rows at a time (``min_rows``);
those that count right examples (``objectives.matches``) can be softened, which does more.
"""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from objectives._set_metric import Classifier, SetMetric, check_labels, predicted
from zo_adapt.errors import DataError, MissingPackageError, OptionError, UndefinedMetricError

Average = Literal["macro", "micro", "binary", "weighted"]
MultiClass = Literal["ovr", "ovo"]


def check_scikit_learn() -> None:
    """Refuse at once what needs it, not when the run first calls it.

    Raises:
        MissingPackageError: It is not installed.
    """
    if find_spec("sklearn") is None:
        raise MissingPackageError(
            "scikit-learn is not installed; pip install 'zo_adapt[metrics]' brings it"
        )


class ScikitLearnMetric(SetMetric):
    """Base of the metrics that scikit-learn computes.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """

    def __init__(
        self, model: nn.Module | Classifier, *, min_rows: int | Literal["all"] = "all"
    ) -> None:
        check_scikit_learn()
        super().__init__(model, min_rows=min_rows)


class F1(ScikitLearnMetric):
    """The harmonic mean of precision and recall.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c);  macro: the mean over the classes that occur among the
    labels or the predictions; weighted: by their number of labels; micro: from the summed counts;
    binary: of class 1. A class without a hit has 0.

    Args:
        model: A model with a classification head, or an objective with logits, ``VerbalizerLoss``.
        average: "macro", "micro", "binary" or "weighted".
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        OptionError: Another ``average``, or "binary" with more than two classes (when called).
        DataError: (when called) Labels missing or of a wrong shape.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> f1 = F1(BertForSequenceClassification(config), average="macro")
        >>> batch = f1.collate([{"input_ids": [2, 7], "label": 0}, {"input_ids": [5], "label": 1}])
        >>> 0.0 <= f1(batch) <= 1.0
        True
    """

    def __init__(
        self,
        model: nn.Module | Classifier,
        *,
        average: Average = "macro",
        min_rows: int | Literal["all"] = "all",
    ) -> None:
        super().__init__(model, min_rows=min_rows)
        self.average = _one_of("average", average, get_args(Average))

    def metric(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """F1 by scikit-learn."""
        from sklearn.metrics import f1_score

        if self.average == "binary" and (labels.ndim == 2 or logits.shape[1] > 2):
            raise OptionError(
                f"average='binary' with {logits.shape[1]} classes; choose 'macro', 'micro' or "
                "'weighted'"
            )
        classes = predicted(logits, labels)
        # Of several labels at once, scikit-learn counts a class that occurs nowhere as 0.
        absent = np.nan if labels.ndim == 2 and self.average != "micro" else 0.0
        value = f1_score(labels, classes, average=self.average, zero_division=absent)
        return float(np.nan_to_num(value))


class MatthewsCorrelation(ScikitLearnMetric):
    """The correlation of predicted and true classes, -1..1; 0 where one of them is constant.

    Args:
        model: A model with a classification head, or an objective with logits, ``VerbalizerLoss``.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        DataError: (when called) Labels missing or of a wrong shape.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> mcc = MatthewsCorrelation(BertForSequenceClassification(config))
        >>> -1.0 <= mcc([{"input_ids": [2], "label": 0}, {"input_ids": [5], "label": 1}]) <= 1.0
        True
    """

    def metric(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The coefficient by scikit-learn."""
        from sklearn.metrics import matthews_corrcoef

        if labels.ndim == 2:
            raise DataError(
                f"labels of shape {labels.shape}: this correlation is of one label per example"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A single label was found", UserWarning)
            return float(matthews_corrcoef(labels, predicted(logits, labels)))


class ROCAUC(ScikitLearnMetric):
    """The probability that an example of a class scores higher in it than one of another class.

    The score is the difference of two logits, or a single one; with more classes their softmax.
    Ties count one half. It needs examples of every class in the batch: stratified passes see to it.

    Args:
        model: A model with a classification head, or an objective with logits, ``VerbalizerLoss``.
        multi_class: "ovr", each class against the rest, or "ovo", all pairs.
        average: "macro" or "weighted" mean over the classes.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        OptionError: Another ``multi_class`` or ``average``.
        UndefinedMetricError: (when called) A class has no example, or all of them.
        DataError: (when called) Labels missing or of a wrong shape.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> auc = ROCAUC(BertForSequenceClassification(config))
        >>> auc([{"input_ids": [2], "label": 0}, {"input_ids": [5], "label": 1}]) in (0.0, 0.5, 1.0)
        True
    """

    def __init__(
        self,
        model: nn.Module | Classifier,
        *,
        multi_class: MultiClass = "ovr",
        average: Literal["macro", "weighted"] = "macro",
        min_rows: int | Literal["all"] = "all",
    ) -> None:
        super().__init__(model, min_rows=min_rows)
        self.multi_class = _one_of("multi_class", multi_class, get_args(MultiClass))
        self.average = _one_of("average", average, ("macro", "weighted"))

    def metric(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The area by scikit-learn."""
        from sklearn.metrics import roc_auc_score

        check_labels(labels, logits.shape)
        _check_classes(labels, max(2, logits.shape[1]))
        if labels.ndim == 2 or logits.shape[1] <= 2:
            return float(roc_auc_score(labels, _scores(logits, labels), average=self.average))
        probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
        return float(
            roc_auc_score(
                labels,
                probabilities,
                average=self.average,
                multi_class=self.multi_class,
                labels=range(logits.shape[1]),
            )
        )


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if value not in choices:
        raise OptionError(f"{name}={value!r}; choose one of {list(choices)}")
    return value


def _scores(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What ranks the examples: every class's logit, or one number in the case of two classes."""
    if labels.ndim == 2:
        return logits
    one: np.ndarray = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    return one


def _check_classes(labels: np.ndarray, classes: int) -> None:
    """Refuse rows without an example of each class and one of another."""
    if labels.ndim == 2:
        bad = [c for c in range(labels.shape[1]) if len(np.unique(labels[:, c])) < 2]
    else:
        counts = [int((labels == c).sum()) for c in range(classes)]
        bad = [c for c, count in enumerate(counts) if count in (0, len(labels))]
    if bad:
        raise UndefinedMetricError(
            f"ROC-AUC of the classes {bad} is not defined on these {len(labels)} rows, which hold "
            "none or nothing else of them; raise batch_size or min_rows, leave stratify on, or set "
            "dataloader_drop_last=True where the last batch of a pass is a short one"
        )
