"""What the ranking metrics share: scores collected in parts, one value for every query."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from objectives.mixture import Mixable
from objectives.scorers import RELEVANCE, QueryBatch, Scorer, checked_relevance
from objectives.text_scorers import scorer_of
from zo_adapt.errors import NonFiniteObjectiveError, OptionError, UndefinedMetricError
from zo_adapt.evaluation.objective import ColumnOf, SetObjective, checked_min_rows

Undefined = Literal["error", "skip"]


class Ranked(NamedTuple):
    """What a micro-batch leaves behind: of every query the relevance and the scores, (n_i,)."""

    relevance: list[np.ndarray]
    scores: list[np.ndarray]


class RankingMetric(Mixable, SetObjective):
    """Base of the ranking metrics: a mean over queries, more is better.

    Called on a batch it gives one value for every query, NaN where one is skipped.

    Args:
        model: A scorer (``FeatureScorer``, ``CrossEncoder``, ``BiEncoder``); a module is taken as a
            cross-encoder if it takes ``input_ids``, else as a function of features.
        undefined: What becomes of a query on which the metric has no value, because none of its
            documents is relevant (for correlations: because all are equally): "error", or "skip".
        min_rows: Fewest queries that one direction sees where a batch is split over several; "all"
            keeps a batch whole.

    Raises:
        OptionError: Another rule, ``min_rows`` below 1.
    """

    maximize = True
    step_like = True

    def __init__(
        self,
        model: nn.Module | Scorer,
        *,
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        if undefined not in ("error", "skip"):
            raise OptionError(f"undefined={undefined!r}; choose 'error' or 'skip'")
        self.scorer, self.undefined = scorer_of(model), undefined
        self.made_with = {"model": self.scorer}
        self.min_rows = checked_min_rows(min_rows)

    @property
    def model(self) -> nn.Module:
        """The model behind the scores."""
        return self.scorer.model

    def collate(self, examples: Sequence[Any]) -> QueryBatch:
        """A batch of a list of queries."""
        return self.scorer.collate(examples)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode of the model."""
        return self.scorer.evaluating()

    def check_columns(self, column: ColumnOf) -> None:
        """Refuse queries whose relevance is no list of numbers >= 0, or leaves them no value.

        Raises:
            DataError: Gives the first of them.
            UndefinedMetricError: A query has no value and the rule is "error".
        """
        given = column(RELEVANCE)
        each = enumerate(() if given is None else given)
        found = [checked_relevance(one, f"query {index} of the data") for index, one in each]
        self._used(found, "data")

    def __call__(self, batch: Any) -> np.ndarray:
        """One value for every query, (b,)."""
        ranked = self.predict(batch)
        used = self._used(ranked.relevance)
        values = np.full(len(used), np.nan)
        values[used] = self.values(*_counted(ranked, used))
        return values

    def predict(self, batch: Any) -> Ranked:
        """The scores of one micro-batch.

        Raises:
            DataError: (of a list of examples) Queries without documents or relevance.
        """
        prepared = batch if isinstance(batch, QueryBatch) else self.collate(batch)
        return Ranked(list(prepared.relevance), prepared.split(self.scorer.scores(prepared)))

    def score(self, predictions: list[Ranked]) -> float:
        """The mean over the queries of all micro-batches.

        Raises:
            UndefinedMetricError: A query has no value and the rule is "error", or none has one.
        """
        ranked = Ranked(*(list(chain(*column)) for column in zip(*predictions, strict=True)))
        used = self._used(ranked.relevance)
        if not used.any():
            raise UndefinedMetricError(
                f"{type(self).__name__} is not defined on any of the {len(used)} queries of the "
                "batch; leave such queries out of the data, or raise batch_size"
            )
        return self.mean(*_counted(ranked, used))

    @abstractmethod
    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """The metric of every query."""

    def mean(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> float:
        """Its mean; at once where a library has it so."""
        return float(self.values(relevance, scores).mean())

    def has_value(self, relevance: np.ndarray) -> bool:
        """Whether the metric is defined: a document is relevant."""
        return bool((relevance > 0).any())

    def _used(self, relevance: list[np.ndarray], where: str = "batch") -> np.ndarray:
        used = np.array([self.has_value(one) for one in relevance], bool)
        if self.undefined == "error" and not used.all():
            index = int(np.flatnonzero(~used)[0])
            raise UndefinedMetricError(
                f"{type(self).__name__} is not defined for query {index} of the {where}, whose "
                f"{len(relevance[index])} documents have the relevance "
                f"{sorted(set(relevance[index].tolist()))[:8]}; leave it out, or choose "
                "undefined='skip'"
            )
        return used


def _counted(ranked: Ranked, used: np.ndarray) -> Ranked:
    """The queries that count, after a check of their scores."""
    if not all(np.isfinite(one).all() for one in ranked.scores):
        raise NonFiniteObjectiveError(
            "the model gave scores that are NaN or infinite; a smaller lr or perturbation_scale "
            "keeps them finite"
        )
    rows = np.flatnonzero(used)
    return Ranked([ranked.relevance[i] for i in rows], [ranked.scores[i] for i in rows])
