"""Any ``compute_metrics`` of a transformers Trainer as an objective."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from objectives._fit import base_model
from objectives._model import Batch
from objectives._set_metric import AnyLabels, Classifier, Predictions, SetMetric
from zo_adapt.errors import (
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    UndefinedMetricError,
)

PREFIX = "eval_"


class MetricObjective(SetMetric):
    """A metric that a Trainer's ``compute_metrics`` computes, with Trainer's conventions.

    The function is called once for an evaluation, with an ``EvalPrediction`` of the predictions and
    the labels of the whole batch. The predictions are what Trainer makes of the model's outputs:
    all of them but the loss, a tuple where there are several (of an encoder-decoder, say). Where
    their length varies from one micro-batch to the next (a label for every token), the shorter are
    padded with -100.

    Args:
        model: A model, or an objective with logits, ``VerbalizerLoss``.
        compute_metrics: ``EvalPrediction -> {name: number}``.
        metric_for_best_model: Which entry, with or without "eval_".
        greater_is_better: None: unless the name ends in "loss", as TrainingArguments has it.
        preprocess_logits_for_metrics: ``(logits, labels) -> predictions``, on every micro-batch.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Raises:
        OptionError: ``compute_metrics`` cannot be called.
        ObjectiveError: (when called) It returned no mapping, or none with that name, or something
            that is not a number.
        UndefinedMetricError: (when called) The metric is NaN.
        DataError: (when called) The labels are missing.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> def compute_metrics(p):
        ...     return {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}
        >>> objective = MetricObjective(BertForSequenceClassification(config),
        ...     compute_metrics=compute_metrics, metric_for_best_model="eval_accuracy")
        >>> objective([{"input_ids": [2, 7], "label": 0}]) in (0.0, 1.0), objective.maximize
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module | Classifier,
        *,
        compute_metrics: Callable[[Any], Mapping[str, Any]],
        metric_for_best_model: str,
        greater_is_better: bool | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Any] | None = None,
        min_rows: int | Literal["all"] = "all",
    ) -> None:
        if not callable(compute_metrics):
            raise OptionError(f"compute_metrics={compute_metrics!r} cannot be called")
        unchecked = AnyLabels(model) if isinstance(model, nn.Module) else model
        super().__init__(unchecked, min_rows=min_rows)
        self._label_names = _label_names(model) if isinstance(model, nn.Module) else ["labels"]
        self.compute_metrics, self.name = compute_metrics, metric_for_best_model
        self.preprocess = preprocess_logits_for_metrics
        self.made_with = {
            "model": self.classifier,
            "metric_for_best_model": metric_for_best_model,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        inferred = not metric_for_best_model.endswith("loss")
        self.maximize = inferred if greater_is_better is None else greater_is_better
        self.step_like = inferred  # a loss is smooth

    def predict(self, batch: Any) -> Predictions:
        """Predictions and labels of one micro-batch.

        Raises:
            DataError: There are no labels.
        """
        from transformers.trainer_pt_utils import nested_numpify

        prepared = self.classifier.prepare(batch)
        labels = self._labels(prepared)
        logits = self._logits(prepared)
        _check_no_nan(logits)
        if self.preprocess is not None:
            logits = self.preprocess(logits, labels)
        return Predictions(*nested_numpify((logits, labels)))

    def _labels(self, batch: Batch) -> Any:
        """The labels as Trainer finds them: one field, or several (start and end positions)."""
        found = [batch[name] for name in self._label_names if name in batch]
        if len(found) < len(self._label_names):
            return self.classifier.labels(batch)
        return found[0] if len(found) == 1 else tuple(found)

    def _logits(self, batch: Batch) -> Any:
        """All that the model returns but the loss, or the one thing that is left."""
        if not isinstance(self.classifier, AnyLabels):
            return self.classifier.logits(batch).detach()
        from transformers.trainer_pt_utils import nested_detach

        outputs = self.classifier.outputs(batch, hidden=())
        ignored = self.classifier.configured("keys_to_ignore_at_inference", ["past_key_values"])
        if isinstance(outputs, Mapping):
            kept = tuple(v for name, v in outputs.items() if name not in {*ignored, "loss"})
        elif isinstance(outputs, tuple | list):
            kept = tuple(outputs[1:])
        else:
            return outputs.detach()
        kept = nested_detach(kept)
        return kept[0] if len(kept) == 1 else kept

    def score(self, predictions: list[Any]) -> float:
        """The named metric of all micro-batches together.

        Raises:
            ObjectiveError: There is no such metric, or it is not a number; predictions of parts of
                the batch that do not fit together.
            UndefinedMetricError: It is NaN.
        """
        from transformers.trainer_pt_utils import nested_concat

        try:
            logits, labels = (
                reduce(nested_concat, column) for column in zip(*predictions, strict=True)
            )
        except ValueError as error:
            raise ObjectiveError(
                f"the predictions of two micro-batches do not fit together ({error}); give "
                "preprocess_logits_for_metrics, and leave out there what varies in more than one "
                "dimension (attentions)"
            ) from error
        return self.metric(logits, labels)

    def metric(self, logits: Any, labels: Any) -> float:
        """The named entry of what ``compute_metrics`` returns."""
        from transformers import EvalPrediction

        metrics = self.compute_metrics(EvalPrediction(predictions=logits, label_ids=labels))
        value = self._named(metrics)
        if np.isnan(value):
            first = labels[0] if isinstance(labels, tuple) else labels
            raise UndefinedMetricError(
                f"compute_metrics gave NaN for {self.name!r} on {len(first)} rows, whose labels "
                f"are {np.unique(first).tolist()[:8]}; raise batch_size or min_rows"
            )
        return value

    def _named(self, metrics: Any) -> float:
        if not isinstance(metrics, Mapping):
            raise ObjectiveError(
                f"compute_metrics returned {type(metrics).__name__}; it must return a dict of names"
                " and numbers"
            )
        bare = self.name.removeprefix(PREFIX)
        for name in (self.name, bare, PREFIX + bare):
            if name in metrics:
                return _float(name, metrics[name])
        raise ObjectiveError(
            f"metric_for_best_model={self.name!r} is not among what compute_metrics returns: "
            f"{sorted(metrics)}"
        )


def _label_names(model: nn.Module) -> list[str]:
    """The fields that Trainer takes for labels."""
    from transformers.utils.generic import find_labels

    names: list[str] = find_labels(type(base_model(model)))
    return names or ["labels"]


def _check_no_nan(outputs: Any) -> None:
    """Refuse predictions that a function would take for classes although they are not numbers."""
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list):
        for one in outputs:
            _check_no_nan(one)
    elif bool(outputs.isnan().any()):
        raise NonFiniteObjectiveError(
            f"{int(outputs.isnan().sum())} of {outputs.numel()} outputs of the model are NaN; a "
            "smaller lr or perturbation_scale keeps them finite"
        )


def _float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"compute_metrics gave {type(value).__name__} for {name!r}; it must be a number"
        ) from error
