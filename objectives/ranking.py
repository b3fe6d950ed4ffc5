"""Ranking metrics as objectives, over queries with any number of documents.

One example is one query with its documents. scikit-learn and scipy compute the metrics where they
have them. Tied scores are handled as scikit-learn does: NDCG is the mean over the orders of the
ties, everywhere else a document stands behind those it is tied with.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
from torch import nn

from objectives._ranking import RankingMetric, Undefined
from objectives.scorers import Scorer
from zo_adapt.errors import OptionError
from zo_adapt.options import at_least_one


class NDCG(RankingMetric):
    """Normalised discounted cumulative gain.

    NDCG@k = DCG@k / max DCG@k,  DCG@k = sum_{r <= k} gain(document at rank r) / log2(r + 1)

    Args:
        model: A scorer, or a module (see ``RankingMetric``).
        k: Ranks that count; None: all.
        gain: "linear", the relevance itself, as scikit-learn has it, or "exponential",
            2^relevance - 1, as in the literature on learning to rank.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        OptionError: k below 1, another gain or rule.
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> query = {"features": torch.randn(4, 2), "relevance": [0, 3, 1, 0]}
        >>> NDCG(model, k=3)([query, query]).shape
        (2,)
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        k: int | None = 10,
        *,
        gain: Literal["linear", "exponential"] = "linear",
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        super().__init__(model, undefined=undefined, min_rows=min_rows)
        if gain not in ("linear", "exponential"):
            raise OptionError(f"gain={gain!r}; choose 'linear' or 'exponential'")
        self.k, self.gain = None if k is None else at_least_one("k", k), gain

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """One call of scikit-learn for every query."""
        pairs = zip(relevance, scores, strict=True)
        return np.array([self.mean([one], [score]) for one, score in pairs])

    def mean(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> float:
        """One call of scikit-learn for all: ten times faster."""
        from sklearn.metrics import ndcg_score

        gains = [one if self.gain == "linear" else np.exp2(one) - 1 for one in relevance]
        return float(ndcg_score(*_padded(gains, scores), k=self.k))


class MAP(RankingMetric):
    """Mean average precision.

    AP = 1/R sum_{relevant d} (relevant documents at or above d) / (documents at or above d)

    Args:
        model: A scorer, or a module (see ``RankingMetric``). Documents of relevance > 0 are
            relevant.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [0, 1, 1]}
        >>> MAP(torch.nn.Identity())([query]).round(4).tolist()
        [0.5833]
    """

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """One call of scikit-learn for every query."""
        pairs = zip(relevance, scores, strict=True)
        return np.array([self.mean([one], [score]) for one, score in pairs])

    def mean(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> float:
        """One call of scikit-learn for all."""
        from sklearn.metrics import label_ranking_average_precision_score

        gains, ranked = _padded(relevance, scores)
        return float(label_ranking_average_precision_score(gains > 0, ranked))


class MRR(RankingMetric):
    """Mean reciprocal rank: 1 / rank of the first relevant document.

    Args:
        model: A scorer, or a module (see ``RankingMetric``). Documents of relevance > 0 are
            relevant.
        k: Ranks that count, beyond them the value is 0; None: all.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        OptionError: k below 1.
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [0, 1, 1]}
        >>> MRR(torch.nn.Identity())([query]).tolist()
        [0.5]
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        k: int | None = None,
        *,
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        super().__init__(model, undefined=undefined, min_rows=min_rows)
        self.k = None if k is None else at_least_one("k", k)

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """1 / rank, 0 beyond k."""
        first = np.array([ranks.min() for ranks in _relevant_ranks(relevance, scores)])
        return np.where(first <= (self.k or np.inf), 1.0 / first, 0.0)


class RecallAt(RankingMetric):
    """The share of the relevant documents that stand among the first k.

    Args:
        model: A scorer, or a module (see ``RankingMetric``). Documents of relevance > 0 are
            relevant.
        k: Ranks that count.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        OptionError: k below 1.
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [0, 1, 1]}
        >>> RecallAt(torch.nn.Identity(), k=2)([query]).tolist()
        [0.5]
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        k: int = 10,
        *,
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        super().__init__(model, undefined=undefined, min_rows=min_rows)
        self.k = at_least_one("k", k)

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """Relevant documents within k, of all relevant ones."""
        return np.array([(r <= self.k).mean() for r in _relevant_ranks(relevance, scores)])


def _padded(gains: list[np.ndarray], scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All queries as one matrix: a document without gain, ranked last, changes no metric."""
    # A column more than the longest has: scikit-learn does not rank a single document.
    shape = len(gains), 1 + max(len(one) for one in gains)
    matrix, ranked = np.zeros(shape), np.zeros(shape)
    for row, (gain, score) in enumerate(zip(gains, scores, strict=True)):
        matrix[row, : len(gain)] = gain
        ranked[row, : len(score)] = score
        ranked[row, len(score) :] = np.nextafter(score.min(), -np.inf)
    return matrix, ranked


def _relevant_ranks(relevance: list[np.ndarray], scores: list[np.ndarray]) -> Iterable[np.ndarray]:
    """The ranks of the relevant documents of every query; of ties the last."""
    from scipy.stats import rankdata

    for one, score in zip(relevance, scores, strict=True):
        yield rankdata(-score, method="max")[one > 0]
